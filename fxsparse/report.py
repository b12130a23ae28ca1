"""The table that `SparseModule.report()` prints."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from tabulate import tabulate
from torch import Tensor

from .core.channel_sites import ChannelPlan
from .core.granularity import Granularity, UnitLayout
from .core.records import Uncovered, WeightSite
from .flops import FlopReport
from .flops.tables import convention_line, warnings


def site_report(
    heading: Sequence[str],
    sites: Sequence[WeightSite],
    counts: Mapping[str, int],
    flops: FlopReport,
    uncovered: Sequence[Uncovered],
    notes: Sequence[str],
) -> str:
    """Sites with shape, density, active weights and MACs; then totals, and every weight without a mask.

    Args:
        heading: lines to begin with.
        counts: weight name -> number of active weights.
    """
    macs = defaultdict(list)
    for node in flops.nodes:  # a unit that is called again has nodes with a number behind their names
        macs[(node.call or node.node).partition("#")[0]].append(node)
    rows = []
    for site in sites:
        calls = {use.node for use in site.uses if use.mode == "eval"}
        costs = [cost for call in calls for cost in macs[call] if cost.weight in (None, site.name) and cost.elements]
        rows.append(
            [
                site.name,
                "x".join(map(str, site.shape)),
                f"{site.operation} ({site.form})" if site.form else site.operation,
                counts[site.name] / site.numel,
                counts[site.name],
                site.numel,
                sum(cost.sparse_macs for cost in costs),
                sum(cost.macs for cost in costs),
            ]
        )
    total, active = sum(site.numel for site in sites), sum(counts.values())
    rows.append(["total", "", "", active / total, active, total, flops.macs, flops.dense_macs])
    header = ["weight", "shape", "operation", "density", "active", "of", "MACs", "of"]
    lines = [
        *heading,
        convention_line(flops),
        tabulate(rows, header, intfmt=",", floatfmt=".4f"),
        f"sparsity {1 - active / total:.4f}; inference FLOPs {flops.ratio:.4f} of dense",
    ]
    if uncovered:
        lines += ["", "without a mask:"]
        lines += [f"  {item.name} {'x'.join(map(str, item.shape))}: {item.reason}" for item in uncovered]
    lines += [f"note: {note}" for note in notes]
    depthwise = [site for site in sites if site.depthwise and counts[site.name] < site.numel]
    if depthwise:
        lines.append(
            f"note: {len(depthwise)} depthwise weights are sparse; exclude=('depthwise', 'first') keeps them dense"
        )
    lines += warnings(flops)
    return "\n".join(lines)


def unit_lines(granularity: Granularity, layouts: Mapping[str, UnitLayout], left_dense: Mapping[str, str]) -> list[str]:
    """What is dropped and grown as one, where that is not said elsewhere, where it is smaller, and where it is not."""
    smaller = [line for name, layout in layouts.items() if (line := layout.describe(name))]
    lines = [granularity.phrase, *(f"  smaller ones: {line}" for line in smaller)]
    lines += [f"  left dense: {name}, {reason}" for name, reason in left_dense.items()]
    return [line for line in lines if line]


def channel_lines(plan: ChannelPlan, alive: Mapping[str, Tensor]) -> list[str]:
    """How many channels of each group are active, what is in no budget, and why other channels stay."""
    rows = [[site.producers[0], len(site.producers) - 1, int(alive[site.name].sum()), site.size] for site in plan.sites]
    lines = ["channels that are dropped and grown:", tabulate(rows, ["made by", "and more", "active", "of"])]
    if plan.outside:
        lines.append(f"in no budget, since it makes the output: {', '.join(sorted(plan.outside))}")
    lines += [f"channels of {name} stay: {reason}" for name, reason in plan.stays.items()]
    return [*lines, ""]
