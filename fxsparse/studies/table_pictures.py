"""A comparison's picture: score against density, score against training FLOPs; error bars are the spread.

matplotlib is optional: without it `draw` returns False and nothing else happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fxsparse.studies.table import Line, Table

SIDESTEP = 0.015  # of the axis, between lines of one density, so that error bars do not cover each other
MARKERS = "osD^vP*X<>ph"
DASHES = ("-", ":", "-.")
_COLOURS = [f"C{index}" for index in range(10)] + "black gold navy lime teal magenta maroon coral".split()
WIDE_RATIO = 3  # from this ratio of the largest to the smallest on, an axis is logarithmic


Figures = Mapping[tuple[str, str | None], Mapping[float, tuple[float, float]]]
"""Label and distribution -> sparsity -> mean and spread, as they stand on the axis: to be set beside the lines."""


def draw(table: Table, path: str | Path, title: str = "", beside: Figures = MappingProxyType({})) -> bool:
    """Draw what is finished of the table into the picture `path`; False if matplotlib is not installed.

    `beside` are scores from elsewhere, published ones say, as grey crosses against the density.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines = [line for line in table.lines if line.finished]
    rows = max(1, len(lines))
    figure = Figure(figsize=(14, max(5.0, 0.28 * rows + 1)), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    left, right = figure.subplots(1, 2, sharey=True)
    scale = 100 if table.metric == "accuracy" else 1
    _against_density(left, table, lines, scale, beside)
    _against_flops(right, table, lines, scale)
    left.set_ylabel(f"test {table.metric}{', %' if scale == 100 else ''}")
    if lines:
        figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return True


def draw_or_explain(table: Table, path: str | Path, title: str = "", beside: Figures = MappingProxyType({})) -> str:
    """`draw`, and a line that says where the picture is or why there is none."""
    try:
        return f"picture: {path}" if draw(table, path, title, beside) else "no picture: pip install matplotlib"
    except OSError as error:
        return f"no picture: could not write {path}: {error.strerror or error}"


def _against_density(axes: Any, table: Table, lines: list[Line], scale: float, beside: Figures) -> None:
    sparse = [line for line in lines if _has_density(line)]
    densities = [1 - sparsity for sparsity in table.columns]
    width = max(densities) / min(densities)
    for line in lines:
        cells = list(line.finished.items())
        if line not in sparse:
            style = _style(table, line)
            mean, spread = cells[0][1].mean * scale, (cells[0][1].spread or 0.0) * scale
            axes.axhspan(mean - spread, mean + spread, color=style["color"], alpha=0.12, linewidth=0)
            axes.axhline(mean, label=table.name(line), color=style["color"], linestyle="--")
            for given, _ in beside.get((line.label, line.distribution), {}).values():
                axes.axhline(given, color="grey", linestyle=":")
            continue
        step = (sparse.index(line) - (len(sparse) - 1) / 2) * SIDESTEP
        places = [(1 - sparsity) * (max(width, 1.5) ** step) for sparsity, _ in cells]
        _plot(axes, places, cells, scale, label=table.name(line), **_style(table, line))
        for given_at, (mean, spread) in beside.get((line.label, line.distribution), {}).items():
            place = (1 - given_at) * (max(width, 1.5) ** step)
            axes.errorbar([place], [mean], yerr=[spread], color="grey", marker="x", capsize=2, zorder=1)
    if len(set(densities)) > 1:
        axes.set_xlim(min(densities) / width**0.2, max(densities) * width**0.2)
        axes.set_xscale("log")
    axes.set_xticks(densities, [f"{density:g}" for density in densities])
    axes.minorticks_off()
    axes.set(xlabel="density (lines side by side)", title=f"{table.metric} against density")
    axes.grid(alpha=0.3)


def _against_flops(axes: Any, table: Table, lines: list[Line], scale: float) -> None:
    costs = [cell.training_flops for line in lines for cell in line.finished.values()]
    for line in lines:
        cells = list(line.finished.items())
        cells = cells if _has_density(line) else cells[:1]
        _plot(
            axes,
            [cell.training_flops for _, cell in cells],
            cells,
            scale,
            label=table.name(line),
            **_style(table, line),
        )
    if costs and min(costs) > 0 and max(costs) / min(costs) >= WIDE_RATIO:
        axes.set_xscale("log")
        ticks = [
            tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if min(costs) / 2 < tick < max(costs) * 2
        ]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set(xlabel="training FLOPs x dense", title=f"{table.metric} against training FLOPs")
    axes.grid(alpha=0.3)


def _has_density(line: Line) -> bool:
    """Whether the line goes by the columns; the dense one stands in all of them."""
    return line.method != "dense"


def _style(table: Table, line: Line) -> dict[str, Any]:
    """A colour and a marker for each label, a dash for each distribution."""
    labels = list(dict.fromkeys(each.label for each in table.lines))
    index = labels.index(line.label)
    place = table.distributions.index(line.distribution) if line.distribution else 0
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[place % len(DASHES)],
        "markerfacecolor": "white" if place else None,
    }


def _plot(axes: Any, places: list[float], cells: list, scale: float, **style: Any) -> None:
    means = [cell.mean * scale for _, cell in cells]
    spreads = [(cell.spread or 0.0) * scale for _, cell in cells]
    axes.errorbar(places, means, yerr=spreads, capsize=3, linewidth=1.2, **style)
