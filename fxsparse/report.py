"""The table that `SparseModule.report()` prints."""

from typing import TYPE_CHECKING

from tabulate import tabulate

from .flops.tables import convention_line, warnings

if TYPE_CHECKING:
    from .sparse_module import SparseModule


def report(sparse: "SparseModule") -> str:
    """Sites with shape, density, active weights and MACs; then totals, and every weight without a mask."""
    counts = sparse.active_counts
    flops = sparse.flops()
    macs = {node.node: node for node in flops.nodes}
    rows = []
    for site in sparse.sites:
        costs = [macs[use.node] for use in site.uses if use.mode == "eval" and use.node in macs]
        rows.append(
            [
                site.name,
                "x".join(map(str, site.shape)),
                site.operation,
                counts[site.name] / site.numel,
                counts[site.name],
                site.numel,
                sum(cost.sparse_macs for cost in costs),
                sum(cost.macs for cost in costs),
            ]
        )
    total, active = sum(site.numel for site in sparse.sites), sum(counts.values())
    rows.append(["total", "", "", active / total, active, total, flops.macs, flops.dense_macs])
    header = ["weight", "shape", "operation", "density", "active", "of", "MACs", "of"]
    lines = [
        f"method {sparse.method.name}: {sparse.method.summary}",
        f"captured by the {sparse.capture} tracer; "
        + ("one graph for both modes" if sparse.graphs["train"] is sparse.graphs["eval"] else "a graph for each mode"),
        convention_line(flops),
        tabulate(rows, header, intfmt=",", floatfmt=".4f"),
        f"sparsity {sparse.sparsity:.4f}; inference FLOPs {flops.ratio:.4f} of dense",
    ]
    if sparse.uncovered:
        lines += ["", "without a mask:"]
        lines += [f"  {item.name} {'x'.join(map(str, item.shape))}: {item.reason}" for item in sparse.uncovered]
    lines += [f"note: {note}" for note in sparse.notes]
    lines += warnings(flops)
    return "\n".join(lines)
