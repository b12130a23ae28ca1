"""A `FlopReport` as text: terminal table, Markdown, CSV, plain values for JSON. One row a layer or module."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from ..core.node_cost import NodeCost
from .flop_counts import FlopCounts

COLUMNS = (
    "layer",
    "operation",
    "weight shape",
    "input",
    "output",
    "density",
    "non-zero",
    "MACs dense",
    "MACs sparse",
    "share",
    "parameters",
)
"""The columns of every listing; `share` is of the sparse total."""


@dataclass(frozen=True)
class Row:
    """One line of a listing; shapes are empty for a group of layers."""

    layer: str
    operation: str
    weight_shape: tuple[int, ...] | None
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    elements: int
    active: int
    dense: float
    sparse: float
    share: float
    parameters: int

    @property
    def density(self) -> float | None:
        """Active over all weight elements; None for a row without weights."""
        return self.active / self.elements if self.elements else None

    def cells(self) -> list[Any]:
        """The values under `COLUMNS`."""
        return [
            self.layer,
            self.operation,
            _shape(self.weight_shape),
            _shape(self.input_shape),
            _shape(self.output_shape),
            self.density,
            self.active if self.elements else None,
            self.dense,
            self.sparse,
            self.share,
            self.parameters,
        ]


def rows(report: FlopCounts, depth: int | None = None) -> list[Row]:
    """One row a layer that costs something, or one a module down to `depth` levels, in execution order.

    Columns `dense` and `sparse` are MACs; with categories, or in the `micronet` convention, they are FLOPs.
    """
    sparse, dense = costs(report)
    total = sum(sparse.values()) or 1
    if depth is None:
        shown = [node for node in report.nodes if dense[node.node] or node.unknown]
        return [
            Row(
                layer=node.module or node.node,
                operation=node.operation,
                weight_shape=node.weight_shape,
                input_shape=node.input_shape,
                output_shape=node.output_shape,
                elements=node.elements,
                active=node.active,
                dense=dense[node.node],
                sparse=sparse[node.node],
                share=sparse[node.node] / total,
                parameters=node.parameters,
            )
            for node in shown
        ]
    groups: dict[str, list[NodeCost]] = {}
    for node in report.nodes:
        if dense[node.node] or node.unknown:
            groups.setdefault(".".join(node.module.split(".")[:depth]) if depth else "", []).append(node)
    return [_group(name, nodes, sparse, dense, total) for name, nodes in groups.items()]


def costs(report: FlopCounts) -> tuple[dict[str, float], dict[str, float]]:
    """Node name -> cost, sparse and dense: MACs, or FLOPs where the report counts more than MACs."""
    if report.convention == "macs" and not report.also:
        return {n.node: n.sparse_macs for n in report.nodes}, {n.node: n.macs for n in report.nodes}
    return report.flops_by_node, report.dense_flops_by_node


def headers(report: FlopCounts) -> tuple[str, ...]:
    """`COLUMNS`, with FLOPs for MACs where the report counts more than MACs."""
    plain_macs = report.convention == "macs" and not report.also
    return COLUMNS if plain_macs else tuple(name.replace("MACs", "FLOPs") for name in COLUMNS)


def convention_line(report: FlopCounts) -> str:
    """One sentence that says what is counted; the head of every report."""
    if report.convention == "micronet":
        return (
            "FLOPs of one forward pass of the example in the micronet convention (the paper's): multiplications "
            "plus additions, n and n - 1 for a product of n terms, bias and ReLU of every layer; convolutions and "
            "linears only"
        )
    line = "MACs of one forward pass of the example, FLOPs are 2 x MACs; positions on padding count"
    left_out = "bias, normalisation, activations, pooling, softmax, reductions and elementwise work do not"
    return f"{line}; counted besides, in FLOPs: {', '.join(report.also)}" if report.also else f"{line}; {left_out}"


def total_line(report: FlopCounts) -> str:
    """The totals in words."""
    macs = f"{report.dense_macs:,} MACs dense, {report.macs:,} sparse; " if report.convention == "macs" else ""
    return (
        f"total: {macs}{report.dense_flops:,.0f} FLOPs dense, {report.flops:,.0f} sparse, "
        f"ratio {report.ratio:.4f}; {report.parameters:,} parameters"
    )


def warnings(report: FlopCounts) -> list[str]:
    """A line for every node with an operation that could not be counted, and for choices made in counting."""
    lines = [
        f"not counted: {', '.join(operations)} in node {name}, {report.places.get(name, 'place unknown')}"
        for name, operations in report.unknown.items()
    ]
    return lines + [f"note: {node.node}: {node.detail}" for node in report.nodes if node.detail]


def table(report: FlopCounts, depth: int | None = None, style: str = "simple") -> str:
    """See `FlopReport.table`."""
    listed = rows(report, depth)
    cells = [[*row.cells()[:5], *map(_number, row.cells()[5:])] for row in listed]
    cells.append(_total_cells(report, listed))
    if style == "simple":
        cells = [[_short(cell) if isinstance(cell, str) else cell for cell in row] for row in cells]
    body = tabulate(cells, headers(report), tablefmt=style, disable_numparse=True, colalign=_ALIGNMENT)
    return "\n".join([convention_line(report), "", body, "", total_line(report), *warnings(report)])


def comma_separated(report: FlopCounts, depth: int | None = None) -> str:
    """A comment line with the convention, then the rows as CSV with their names; shapes as `64x3x7x7`."""
    text = io.StringIO()
    text.write(f"# {convention_line(report)}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headers(report))
    writer.writerows(row.cells() for row in rows(report, depth))
    return text.getvalue()


def plain(report: FlopCounts) -> dict[str, Any]:
    """Convention, totals and nodes as plain values, for JSON."""
    sparse, dense = report.flops_by_node, report.dense_flops_by_node
    return {
        "convention": report.convention,
        "counted": convention_line(report),
        "also": list(report.also),
        "macs": report.macs,
        "dense_macs": report.dense_macs,
        "flops": report.flops,
        "dense_flops": report.dense_flops,
        "ratio": report.ratio,
        "parameters": report.parameters,
        "other_flops": report.other,
        "unknown": {
            name: {"operations": list(operations), "place": report.places.get(name, "")}
            for name, operations in report.unknown.items()
        },
        "nodes": [
            {
                "node": node.node,
                "module": node.module,
                "operation": node.operation,
                "weight": node.weight,
                "weight_shape": node.weight_shape,
                "input_shape": node.input_shape,
                "output_shape": node.output_shape,
                "density": report.densities.get(node.weight or "", node.density),
                "elements": node.elements,
                "active": node.active,
                "macs": node.sparse_macs,
                "dense_macs": node.macs,
                "flops": sparse[node.node],
                "dense_flops": dense[node.node],
                "parameters": node.parameters,
                "other_flops": dict(node.other),
                "backward_macs": node.sparse_backward,
                "dense_backward_macs": node.backward,
            }
            for node in report.nodes
        ],
    }


_ALIGNMENT = ["left"] * 5 + ["right"] * 6


def weight_counts(nodes: Sequence[NodeCost]) -> tuple[int, int]:
    """Elements and active elements of the weights that the nodes use, each weight once."""
    weights = {node.weight or node.node: (node.elements, node.active) for node in nodes}
    return sum(elements for elements, _ in weights.values()), sum(active for _, active in weights.values())


def _group(name: str, nodes: Sequence[NodeCost], sparse: dict, dense: dict, total: float) -> Row:
    kinds = {node.operation for node in nodes}
    return Row(
        layer=name or "(the whole model)",
        operation=next(iter(kinds)) if len(kinds) == 1 else f"{len(nodes)} calls",
        weight_shape=None,
        input_shape=nodes[0].input_shape,
        output_shape=nodes[-1].output_shape,
        elements=weight_counts(nodes)[0],
        active=weight_counts(nodes)[1],
        dense=sum(dense[node.node] for node in nodes),
        sparse=sum(sparse[node.node] for node in nodes),
        share=sum(sparse[node.node] for node in nodes) / total,
        parameters=sum({node.weight or node.node: node.parameters for node in nodes}.values()),
    )


def _total_cells(report: FlopCounts, listed: Sequence[Row]) -> list[Any]:
    elements, active = weight_counts(report.nodes)
    dense, sparse = sum(row.dense for row in listed), sum(row.sparse for row in listed)
    numbers = [active / elements if elements else None, active, dense, sparse, 1.0, report.parameters]
    return ["total", "", "", "", "", *map(_number, numbers)]


def _shape(shape: tuple[int, ...] | None) -> str:
    return "x".join(map(str, shape)) if shape else ""


def _short(text: str, limit: int = 44) -> str:
    return text if len(text) <= limit else f"...{text[3 - limit :]}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and abs(value) <= 1:
        return f"{value:.4f}"
    return f"{value:,.0f}"
