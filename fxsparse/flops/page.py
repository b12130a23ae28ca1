"""The report as one self-contained web page: `page.html` with the numbers of a report put in."""

import json
from math import sqrt
from pathlib import Path
from typing import Any

from ..channels.channel_groups import ChannelGroups
from .channel_page import channel_data
from .flop_report import FlopReport
from .picture import colour, layers
from .tables import convention_line, costs, headers, rows, warnings, weight_counts

TEMPLATE = Path(__file__).with_name("page.html")
_KINDS = "sssssfiiifi"  # of the columns: text, fraction, integer


def page(report: FlopReport, title: str = "model", groups: ChannelGroups | str | None = None) -> str:
    """The page as text; it loads nothing and opens from disk.

    `groups` are the model's groups of channels, or why there are none; None leaves them out.
    """
    data = _data(report, title) | {"channels": None if groups is None else channel_data(groups)}
    encoded = json.dumps(data, separators=(",", ":"))
    # Inside a script element, only `</` could end the data early.
    return TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", encoded.replace("</", "<\\/"))


def _data(report: FlopReport, title: str) -> dict[str, Any]:
    names = headers(report)
    return {
        "title": title,
        "convention": convention_line(report),
        "figures": _figures(report),
        "warnings": warnings(report),
        "columns": [{"name": name, "kind": kind} for name, kind in zip(names, _KINDS, strict=True)],
        "rows": [row.cells() for row in rows(report)],
        "tree": _tree(report),
        "graph": _graph(report),
    }


def _figures(report: FlopReport) -> list[list[str]]:
    elements, active = weight_counts(report.nodes)
    return [
        [f"{report.dense_macs:,}", "MACs dense"],
        [f"{report.macs:,}", "MACs sparse"],
        [f"{report.dense_flops:,.0f}", "FLOPs dense"],
        [f"{report.flops:,.0f}", "FLOPs sparse"],
        [f"{report.ratio:.4f}", "sparse over dense"],
        [f"{active / elements:.4f}" if elements else "1", "density of the weights"],
        [f"{report.parameters:,}", "parameters"],
    ]


def _tree(report: FlopReport) -> dict[str, Any]:
    """Modules within modules; a call of its own in a module that has others is a leaf."""
    sparse, dense = costs(report)
    total = sum(sparse.values()) or 1
    root: dict[str, Any] = {"name": "model", "dense": 0, "sparse": 0, "children": {}}
    for node in report.nodes:
        if not dense[node.node]:
            continue
        path = [*node.module.split(".")] if node.module else []
        here = root
        for atom in [None, *path, f"{node.node}  {node.operation}"]:
            if atom is not None:
                here = here["children"].setdefault(atom, {"name": atom, "dense": 0, "sparse": 0, "children": {}})
            here["dense"] += dense[node.node]
            here["sparse"] += sparse[node.node]

    def finished(branch: dict[str, Any]) -> dict[str, Any]:
        children = [finished(child) for child in branch["children"].values()]
        if len(children) == 1 and not children[0]["children"]:  # a module that is one call
            return {**branch, "children": [], "share": branch["sparse"] / total}
        return {**branch, "children": children, "share": branch["sparse"] / total}

    return finished(root)


def _graph(report: FlopReport) -> list[dict[str, Any]]:
    sparse, dense = costs(report)
    largest = max(sparse.values(), default=0) or 1
    nodes = {node.node: node for node in report.nodes}
    places = layers(report.links)
    drawn = []
    for name, sources in report.links:
        node, (x, y) = nodes.get(name), places[name]
        if node is not None and dense[name]:
            label = (node.module or name).split(".")
            shown = ".".join(label[-2:])
            tip = [node.module or name, node.operation, f"cost {sparse[name]:,.0f} of {dense[name]:,.0f}"]
            if node.elements:
                tip.insert(2, f"density {node.density:.4f}: {node.active:,} of {node.elements:,}")
            width = max(60 + 110 * sqrt(sparse[name] / largest), 7 * len(shown) + 12)
            fill = colour(node.density) if node.elements else "#cfe3f3"
        else:
            shown = node.operation if node is not None else name
            tip, width, fill = [name, "costs nothing in this convention"], 7 * len(shown) + 10, "#ffffff"
        if node is not None and node.output_shape:
            tip.append("output " + "x".join(map(str, node.output_shape)))
        drawn.append(
            {
                "name": name,
                "label": shown,
                "tip": "\n".join(tip),
                "width": round(width, 1),
                "fill": fill,
                "x": x,
                "y": y,
                "from": list(sources),
            }
        )
    return drawn
