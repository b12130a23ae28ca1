"""`--layers`: from which sparsity on a layer shape is faster sparse, and how near it comes to the machine's bounds."""

from pathlib import Path
from typing import Any

from bench_parts.peers import Left
from tabulate import tabulate

from .bounds import measured_bounds
from .measure import FORMATS, Entrant
from .single_layers import macs

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97)


def sweep_entrants() -> list[Entrant]:
    dense = [Entrant(label, "eager", more={"format": layout}) for label, layout in FORMATS]
    return dense + [Entrant("fxsparse", "ours", "ours", sparsity) for sparsity in SPARSITIES]


def measure_bounds(threads: int) -> dict[str, Any]:
    try:
        return measured_bounds(threads)
    except Left as left:
        return {"failed": str(left)}


def times_of(group: dict[str, Any]) -> tuple[float, dict[float, float]] | None:
    """Least seconds of dense, and of ours at each sparsity; None where either is missing."""
    dense = [record["least"] for record in group["records"] if record["role"] == "dense" and not record["failed"]]
    ours = {r["sparsity"]: r["least"] for r in group["records"] if r["role"] == "ours" and not r["failed"]}
    return (min(dense), dict(sorted(ours.items()))) if dense and ours else None


def break_even(dense: float, ours: dict[float, float]) -> tuple[float | None, str]:
    """The sparsity from which on all measured times are below dense, with straight lines between them.

    (None, ">97%") where the last is not below; (None, "<50%") where all are.
    """
    sparsities = sorted(ours)
    above = [sparsity for sparsity in sparsities if ours[sparsity] >= dense]
    if not above:
        return None, f"<{sparsities[0]:.0%}"
    low = above[-1]
    if low == sparsities[-1]:
        return None, f">{low:.0%}"
    high = sparsities[sparsities.index(low) + 1]
    found = low + (high - low) * (ours[low] - dense) / (ours[low] - ours[high])
    return found, f"{found:.0%}"


def gmacs(group: dict[str, Any], sparsity: float, seconds: float) -> float:
    """Multiply-adds of active weights a second, in 1e9, over the forward and both backward passes."""
    return 3 * macs(tuple(group["shape"]), group["settings"]["batch"]) * (1 - sparsity) / seconds / 1e9


def sweep_page(results: Any, picture: Path) -> str:
    """The section of the page, and its picture."""
    parts = []
    for threads, bounds in sorted(results.bounds.items()):
        groups = [group for group in results.of("sweep", int(threads)) if times_of(group)]
        lines = []
        for group in groups:
            dense, ours = times_of(group)
            shown = [f"{dense / ours[s]:.2f}x" if s in ours else "" for s in SPARSITIES]
            lines.append([group["layer"], f"{1e3 * dense:.2f}", *shown, break_even(dense, ours)[1]])
        title = f"## From which sparsity on: {threads} thread{'s' * (threads != '1')}"
        titles = ("layer", "dense ms", *(f"{s:.0%}" for s in SPARSITIES), "break-even")
        parts += [title, SWEEP, tabulate(lines, titles, "github", disable_numparse=True), _bounds_text(bounds)]
        if any(group["shape"][2] for group in groups) and "failed" not in bounds:
            name = picture if threads == min(results.bounds) else picture.with_stem(f"{picture.stem}-{threads}")
            draw(groups, bounds, name, int(threads))
            parts.append(f"![achieved multiply-adds a second against the bounds]({name.name})")
    return "\n" + "\n\n".join(parts) + "\n"


SWEEP = """How many times faster than the faster of PyTorch's two memory formats each layer runs, forward and both
backward passes, and the sparsity from which on it is faster."""


def _bounds_text(bounds: dict[str, Any]) -> str:
    if "failed" in bounds:
        return f"The machine's bounds were not measured: {bounds['failed']}."
    read = ", ".join(f"{level} {bounds[f'{level}_gbs']:.0f} GB/s" for level in ("L1", "L2") if f"{level}_gbs" in bounds)
    limit = f"; one L2 read of 4 bytes a multiply-add allows {bounds['l2_gmacs']:.1f}" if "l2_gmacs" in bounds else ""
    return f"Measured bounds: {bounds['peak_gmacs']:.1f} GMAC/s at peak{limit}. Reads: {read}."


def draw(groups: list[dict[str, Any]], bounds: dict[str, Any], path: Path, threads: int) -> None:
    """Multiply-adds a second over sparsity, a line for each layer, below the measured bounds."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "fxsparse"
    kinds = {1: "1x1 convolutions", 3: "3x3 convolutions"}
    shown = [kernel for kernel in kinds if any(group["shape"][2] == kernel for group in groups)]
    groups = [group for group in groups if group["shape"][2] in kinds]
    reached = [gmacs(group, s, t) for group in groups for s, t in times_of(group)[1].items()]
    lowest, highest = min(reached), max(*reached, bounds["peak_gmacs"])
    figure, axes = plt.subplots(1, len(shown), figsize=(5.2 * len(shown), 5.2), sharey=True, squeeze=False)
    sides = sorted({group["shape"][4] // max(group["shape"][3], 1) for group in groups}, reverse=True)
    colours = {side: plt.get_cmap("viridis")(place / max(len(sides) - 0.5, 1)) for place, side in enumerate(sides)}
    for axis, kernel in zip(axes[0], shown, strict=True):
        for group in (group for group in groups if group["shape"][2] == kernel):
            dense, ours = times_of(group)
            _, _, _, stride, side = group["shape"]
            style = {"color": colours[side // max(stride, 1)], "linestyle": "-" if stride <= 1 else ":"}
            axis.plot(
                [100 * s for s in ours], [gmacs(group, s, t) for s, t in ours.items()], "o", ms=3, lw=1.2, **style
            )
            axis.plot([40], [gmacs(group, 0.0, dense)], "_", ms=12, color=style["color"])
        limits = [("peak_gmacs", "peak of multiply-add", "-"), ("l2_gmacs", "one L2 read a multiply-add", "--")]
        for key, label, line in limits:
            if key in bounds:
                axis.axhline(bounds[key], color="firebrick", linestyle=line, linewidth=1)
                axis.text(99, bounds[key] * 1.03, label, color="firebrick", ha="right", fontsize=8)
        axis.set(title=kinds[kernel], xlabel="sparsity, %", yscale="log", xlim=(36, 100))
        axis.set_xticks([40, 50, 60, 70, 80, 90, 97], ["dense", "50", "60", "70", "80", "90", "97"])
        axis.grid(alpha=0.25, which="both", linewidth=0.5)
    axes[0][0].set_ylabel("GMAC/s of active weights")
    rates = [2, 5, 10, 20, 50, 100, 200, 500]
    axes[0][0].set_yticks(rates, [str(rate) for rate in rates])
    axes[0][0].set_ylim(bottom=lowest / 1.5, top=1.4 * highest)
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], color=colours[side], label=f"output {side}x{side}") for side in sides]
    marks.append(Line2D([], [], color="grey", linestyle=":", label="stride 2"))
    marks.append(Line2D([], [], color="grey", marker="_", ms=12, linestyle="none", label="dense PyTorch"))
    figure.legend(handles=marks, loc="lower center", ncols=min(len(marks), 4), fontsize=8, frameon=False)
    count = f"batch {groups[0]['settings']['batch']}, {threads} thread{'s' * (threads > 1)}"
    figure.suptitle(f"Forward and both backward passes of each layer, {count}", fontsize=11)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
