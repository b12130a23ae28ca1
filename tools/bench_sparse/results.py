"""The file of results, and the table and page made from it."""

import json
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

from bench_parts.files import write_whole
from bench_parts.machine import describe, in_a_line
from tabulate import tabulate

from .goals import WORKS
from .measure import best, geometric_mean

Group = dict[str, Any]


class Results:
    """Finished groups of one machine, on disk after each: a row at a number of threads, or one layer of it."""

    def __init__(self, path: Path) -> None:
        self.path, self.machine, self.groups, self.bounds = path, describe(), [], {}
        if path.exists():
            held = json.loads(path.read_text())
            if held.get("machine") == self.machine:
                self.groups, self.bounds = held["groups"], held.get("bounds", {})
            else:
                print(f"{path} is from another machine or other versions: it starts anew")

    def finished(self, wanted: Group) -> bool:
        """Whether a group is there as it is wanted, nothing of ours failed."""
        return any(
            _key(group) == _key(wanted)
            and group["settings"] == wanted["settings"]
            and set(wanted["sparsities"]) <= set(group["sparsities"])
            and all(not record["failed"] for record in group["records"] if record["role"] == "ours")
            for group in self.groups
        )

    def add(self, group: Group) -> None:
        self.groups = [held for held in self.groups if _key(held) != _key(group)]
        self.groups.append({**group, "date": date.today().isoformat()})
        self.save()

    def save(self) -> None:
        held = {"machine": self.machine, "bounds": self.bounds, "groups": self.groups}
        write_whole(self.path, json.dumps(held, indent=1) + "\n")

    def of(self, row: str, threads: int) -> list[Group]:
        return [group for group in self.groups if group["row"] == row and group["threads"] == threads]


def _key(group: Group) -> tuple[Any, ...]:
    return group["row"], group["threads"], group.get("layer")


TITLES = (
    "work",
    "threads",
    "sparsity",
    "ours",
    "best other",
    "",
    "ratio",
    "of medians",
    "of processor",
    "error",
    "goal",
    "met",
)


def table(results: Results, rows: Iterable[str] = tuple(WORKS)) -> list[list[Any]]:
    """A line for each row, number of threads and sparsity that was measured."""
    lines = []
    for row in rows:
        for threads in sorted({group["threads"] for group in results.groups if group["row"] == row}):
            groups = results.of(row, threads)
            for sparsity in sorted({sparsity for group in groups for sparsity in group["sparsities"]}):
                lines.append([row, threads, f"{sparsity:.0%}", *_figures(row, groups, sparsity)])
    return lines


def _figures(row: str, groups: list[Group], sparsity: float) -> list[Any]:
    kind, goal = WORKS[row].kind, WORKS[row].goals.get(sparsity)
    keys = ("bytes",) if kind == "storage" else ("least", "median", "cpu")
    pairs, failed = [], None
    for group in groups:
        ours = next(r for r in group["records"] if r["role"] == "ours" and r["sparsity"] == sparsity)
        others = {key: best(group["records"], sparsity, key) for key in keys}
        failed = failed or ours["failed"] or (None if others[keys[0]] else "nothing to compare with")
        pairs.append((ours, others))
    ours, other = pairs[0][0], pairs[0][1][keys[0]]
    shown = ["", other["label"], _amount(other, kind)] if other and kind != "layers" else ["", "SparseProp", ""]
    if failed:
        return [f"failed: {failed}"[:90], *shown[1:], "", "", "", "", _goal(kind, goal), "no"]
    shown[0] = f"{len(pairs)} layers" if kind == "layers" else _amount(ours, kind)
    ratios = [geometric_mean([others[key][key] / ours[key] for ours, others in pairs]) for key in keys]
    error = f"{max((ours['error'] or 0) for ours, _ in pairs):.0e}"
    if kind == "storage":
        share = 1 / ratios[0]
        met = goal is not None and share <= goal
        return [*shown, f"{share:.3f}", "", "", error, _goal(kind, goal), "yes" if met else "no"]
    met = goal is not None and ratios[0] >= goal
    return [*shown, *(f"{ratio:.2f}x" for ratio in ratios), error, _goal(kind, goal), "yes" if met else "no"]


def _amount(record: dict[str, Any], kind: str) -> str:
    return f"{record['bytes'] / 2**20:.1f} MiB" if kind == "storage" else f"{1e3 * record['least']:.2f} ms"


def _goal(kind: str, goal: float | None) -> str:
    if goal is None:
        return ""
    return f"{goal:g} at most" if kind == "storage" else f"{goal:g}x"


def everything(results: Results) -> list[list[Any]]:
    """Every contender of every row but the single layers, with the reason of those that are left out."""
    lines = []
    for group in results.groups:
        if group["row"] in WORKS and not group.get("layer"):
            for record in group["records"]:
                version = record.get("version", "").partition("-")[0]
                name = f"{record['label']} {version}".strip()
                name += "" if record["sparsity"] is None else f" at {record['sparsity']:.0%}"
                if record["failed"] or "least" not in record:
                    seconds = [f"left out: {record['failed']}" if record["failed"] else "", "", "", ""]
                else:
                    seconds = [*(f"{1e3 * record[key]:.2f}" for key in ("least", "median", "cpu")), record["times"]]
                error = record.get("error")
                lines.append([group["row"], group["threads"], name, *seconds, "" if error is None else f"{error:.0e}"])
    return lines


EVERYTHING = ("work", "threads", "contender", "least ms", "median ms", "processor ms", "times", "error")


def per_layer(results: Results, threads: int) -> list[list[Any]]:
    """The single layers: milliseconds of dense and SparseProp, ours and the ratio, at each sparsity."""
    lines = []
    for group in results.of("layers", threads):
        for sparsity in sorted(group["sparsities"]):
            ours = next(r for r in group["records"] if r["role"] == "ours" and r["sparsity"] == sparsity)
            dense = [r for r in group["records"] if r["role"] == "dense" and not r["failed"]]
            rival = best(group["records"], sparsity)
            if ours["failed"] or rival is None or not dense:
                lines.append([group["layer"], f"{sparsity:.0%}", "", "", "", ours["failed"] or "no other", ""])
                continue
            quickest = min(record["least"] for record in dense)
            figures = [quickest, rival["least"], ours["least"]]
            ratios = [rival["least"] / ours["least"], quickest / ours["least"]]
            lines.append([group["layer"], f"{sparsity:.0%}", *(f"{1e3 * x:.2f}" for x in figures)])
            lines[-1] += [f"{ratio:.2f}x" for ratio in ratios]
    return lines


PER_LAYER = ("layer", "sparsity", "dense ms", "SparseProp ms", "ours ms", "over SparseProp", "over dense")


def page(results: Results, sweep: str = "") -> str:
    """The page in Markdown."""
    titles = "\n".join(f"- `{row}`: {work.title}" for row, work in WORKS.items())
    layers = per_layer(results, 1)
    parts = [
        INTRODUCTION.format(machine=in_a_line(results.machine), titles=titles),
        tabulate(table(results), TITLES, "github", disable_numparse=True),
        "\n## Every contender\n",
        tabulate(everything(results), EVERYTHING, "github", disable_numparse=True),
    ]
    if layers:
        parts += [LAYERS, tabulate(layers, PER_LAYER, "github", disable_numparse=True)]
    return "\n".join(parts) + "\n" + sweep


INTRODUCTION = """# What unstructured sparsity saves

Written by `python tools/bench.py sparse --write FILE`. All fp32, on {machine}.

{titles}

`best other` is the fastest of PyTorch eager in both memory formats, `torch.compile` (for inference frozen), ONNX
Runtime and OpenVINO (for inference, held to fp32), and for the character GRU the same network with `nn.GRU` in place
of its loop, which is also what is lowered; for single layers it is the better of SparseProp's two variants at the same
sparsity. Each contender has a process of its own, and all take turns in one run. `ratio` divides the least seconds,
`of medians` the medians, `of processor` the least processor time of all threads, which others on the machine disturb
less. `error` is against the user's own eager model with masked weights: for outputs the largest difference over the
largest magnitude; for a training step the norm of the difference over the norm, of the change that the step makes to
each tensor, the worst tensor's.

Sparsity is spread uniformly, the first layer dense. A training step is forward, backward and SGD with momentum
(fused, for all), and counts with RigL at interval 100: (98 ordinary steps + the update step + the step after it) / 100,
measured with an update every fourth step. The GRU reads 64 characters. `storage` adds up every tensor that can be
reached from the module and its optimizer after a training step, each once: parameters, gradients, momentum,
the patterns of the active weights, masks and BatchNorm's statistics, for dense as well.
"""
LAYERS = """
## Single layers

The distinct layers of the report's ResNet-50, batch 32, forward and both backward passes, one thread. `dense` is the
faster of PyTorch's two memory formats.
"""
