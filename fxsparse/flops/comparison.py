"""Two configurations side by side, layer by layer."""

import csv
import io
import json
from typing import Any

from tabulate import tabulate

from .flop_report import FlopReport
from .tables import convention_line, rows, total_line, warnings


def compare(
    names: tuple[str, str], reports: tuple[FlopReport, FlopReport], style: str, depth: int | None = None
) -> str:
    """Both reports in one listing; layers are matched by name and position among calls of that name.

    Args:
        names: what to call the two.
        style: `"table"`, `"markdown"`, `"csv"` or `"json"`.
        depth: levels of modules to tell apart; None lists every layer.
    """
    merged = _merged(reports, depth)
    if style == "json":
        return json.dumps(
            {
                "first": {"name": names[0], **reports[0].to_dict()},
                "second": {"name": names[1], **reports[1].to_dict()},
                "layers": [dict(zip(_KEYS, row, strict=True)) for row in merged],
            },
            indent=1,
        )
    header = [
        "layer",
        "operation",
        *(f"{what} {side}" for side in "ab" for what in ("density", "cost", "share")),
        "b / a",
    ]
    if style == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([header, *merged])
        return text.getvalue()
    a, b = reports
    total = ["total", "", None, _cost(a), 1.0, None, _cost(b), 1.0, _ratio(_cost(b), _cost(a))]
    shown = [[*row[:2], *map(_text, row[2:])] for row in [*merged, total]]
    alignment = ["left", "left", *["right"] * 7]
    layout = "github" if style == "markdown" else "simple"
    body = tabulate(shown, header, tablefmt=layout, disable_numparse=True, colalign=alignment)
    legend = [f"{side}: {name}" for side, name in zip("ab", names, strict=True)]
    totals = [f"{side}: {total_line(report)}" for side, report in zip("ab", reports, strict=True)]
    return "\n".join([convention_line(a), *legend, "", body, "", *totals, *warnings(a), *warnings(b)])


_KEYS = ("layer", "operation", "density_a", "cost_a", "share_a", "density_b", "cost_b", "share_b", "b_over_a")


def _merged(reports: tuple[FlopReport, FlopReport], depth: int | None) -> list[list[Any]]:
    listed: dict[tuple[str, int], list[Any]] = {}
    for side, report in enumerate(reports):
        seen: dict[str, int] = {}
        for row in rows(report, depth):
            seen[row.layer] = seen.get(row.layer, 0) + 1
            both = listed.setdefault((row.layer, seen[row.layer]), [None, None])
            both[side] = row
    found = []
    for (layer, _), (a, b) in listed.items():
        cells = [x for row in (a, b) for x in ((row.density, row.sparse, row.share) if row else (None, None, None))]
        found.append([layer, (a or b).operation, *cells, _ratio(b.sparse if b else 0, a.sparse if a else 0)])
    return found


def _cost(report: FlopReport) -> float:
    return report.macs if report.convention == "macs" and not report.also else report.flops


def _ratio(b: float, a: float) -> float | None:
    return b / a if a else None


def _text(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"
