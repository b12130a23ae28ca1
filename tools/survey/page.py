"""Writes the coverage page from the rows: totals against the goals, what falls short, one row a model."""

import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tabulate import tabulate

ENOUGH = 0.999
"""Fraction of the weights of a model that the goal wants masked."""

CLOSE = 1e-5
"""Relative difference that the goal allows where the graph runs other kernels than the model."""

GOALS = {
    "torchvision": "every one captured in train and eval, 99.9% of the weights masked, differences within 1e-5",
    "timm": "the same, of one small model of each family",
    "transformers": "the same, of a tiny configuration of each architecture",
    "zoo": "the same, of every network of `models/zoo`",
}


def page(rows: Sequence[Mapping[str, Any]], expected: Mapping[str, int]) -> str:
    """The page as Markdown.

    Args:
        rows: one a model.
        expected: set -> number of its models.
    """
    parts = [_head(), _totals(rows, expected), _shortfalls(rows)]
    parts += [_table(which, [row for row in rows if row["set"] == which]) for which in expected]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head() -> str:
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "timm", "transformers")
    )
    return f"""# Coverage

Written by `make coverage` (`python tools/coverage.py --write docs/coverage.md`); do not edit. Python
{platform.python_version()}, {versions}, on the CPU.

Every model goes through `fxsparse.sparsify(model, example, sparsity=0.5, distribution="uniform")` and is put beside
the eager model whose weights are multiplied by the masks. *Weights* are the elements of the parameters with two or
more dimensions that a convolution, linear, attention or recurrent module holds, and of those that enter a matrix
product of the eager model, found without fxsparse; embedding tables, output layers that share one, gains, and what
neither mode uses are not counted. *Differences* are the largest over all outputs (train: over gradients and buffers
too, of one backward pass), relative to the largest magnitude of the tensor; 0 means that all bits are equal.
*Seconds* are those of `sparsify`. torchvision's detectors get a list of two pictures of different sizes and their
targets, the other networks two samples, small ones where they can be. Pictures of timm's and torchvision's networks
have random content, and all weights are random: nothing is downloaded."""


def good(row: Mapping[str, Any]) -> bool:
    """Whether a row meets the goal."""
    return (
        row["status"] == "captured"
        and row["masked"] >= ENOUGH * row["weights"]
        and row["keys"]
        and not row["silent"]
        and (row["eval"] or 0.0) <= CLOSE
        and (row["train"] or 0.0) <= CLOSE
    )


def _totals(rows: Sequence[Mapping[str, Any]], expected: Mapping[str, int]) -> str:
    table = []
    for which, count in expected.items():
        own = [row for row in rows if row["set"] == which]
        captured = [row for row in own if row["status"] == "captured"]
        weights, masked = (sum(row[key] for row in captured) for key in ("weights", "masked"))
        table.append(
            {
                "set": which,
                "models": count,
                "captured": len(captured),
                "meet the goal": sum(map(good, own)),
                "weights masked": _percent(masked, weights),
                "bit for bit, eval": sum(row["eval"] == 0 for row in captured),
                "train": sum(row["train"] == 0 for row in captured),
                "keys": sum(row["keys"] for row in captured),
                "another batch": sum(row["other_batch"] == "same" for row in captured),
                "goal": GOALS[which],
            }
        )
    return tabulate(table, headers="keys", tablefmt="github")


def _shortfalls(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        name = f"- {row['set']} `{row['model']}`: "
        if row["status"] != "captured":
            lines.append(f"{name}{row['status']}: {row['reason']}")
            continue
        if row["masked"] < ENOUGH * row["weights"]:
            why = "; ".join(row["unmasked"][:2])
            lines.append(f"{name}{_percent(row['masked'], row['weights'])} of the weights masked: {why}")
        for mode in ("eval", "train"):
            if (row[mode] or 0.0) > CLOSE:
                lines.append(f"{name}differs by {row[mode]:.2g} in {mode} mode")
            if row[mode] is None:
                lines.append(f"{name}the model itself does not run on the example in {mode} mode")
        if not row["keys"]:
            lines.append(f"{name}other state-dict keys or another order")
        if row["other_batch"] != "same":
            lines.append(f"{name}another batch size: {row['other_batch']}")
    return "\n".join(["## What falls short", "", *(map(_without_folders, lines) if lines else ["Nothing."])])


def _table(which: str, rows: Sequence[Mapping[str, Any]]) -> str:
    table = []
    for row in sorted(rows, key=lambda row: row["model"]):
        captured = row["status"] == "captured"
        table.append(
            {
                "model": row["model"],
                "captured by": row["mechanism"] if captured else row["status"],
                "weights": f"{row['weights']:,}" if captured else "",
                "masked": _percent(row["masked"], row["weights"]) if captured else "",
                "eval": _number(row["eval"]) if captured else "",
                "train": _number(row["train"]) if captured else "",
                "keys": ("same" if row["keys"] else "other") if captured else "",
                "other batch": row["other_batch"].split(":")[0] if captured else "",
                "seconds": f"{row['seconds']:.1f}" if captured else "",
            }
        )
    return f"## {which}\n\n" + tabulate(table, headers="keys", tablefmt="github", disable_numparse=True)


def _without_folders(text: str) -> str:
    """Paths from the package or the repository on: where those lie differs from machine to machine."""
    root = str(Path(__file__).parents[2])
    return re.sub(r"/[^\s`]*/site-packages/", "", text).replace(f"{root}/", "")


def _number(difference: float | None) -> str:
    return "n/a" if difference is None else "0" if difference == 0 else f"{difference:.1g}"


def _percent(part: int, whole: int) -> str:
    """Rounded down, so that 100% is all."""
    if not whole or part == whole:
        return "100%"
    return f"{int(part / whole * 10_000) / 100:.2f}%"
