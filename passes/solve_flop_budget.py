"""Finds the overall sparsity at which a graph costs a given fraction of its dense FLOPs."""

from collections.abc import Collection, Mapping, Sequence

from fxsparse.core.flop_budget import solve_flop_budget as solve
from fxsparse.core.node_cost import NodeCost
from fxsparse.core.records import WeightSite

from .allocate_sparsity import allocate_sparsity


def solve_flop_budget(
    nodes: Sequence[NodeCost],
    sites: Sequence[WeightSite],
    flops: float,
    distribution: str | Mapping[str, float] = "erk",
    *,
    dense: Collection[str] = (),
    explicit: Mapping[str, float] | None = None,
    power: float = 1.0,
    dense_inside: bool = True,
    units: Mapping[str, int] | None = None,
) -> float:
    """The sparsity that `allocate_sparsity` needs, with the same options, to cost `flops` times the dense graph.

    Args:
        nodes: what every node of the graph costs; nodes without a site's weight stay as they are.
        flops: cost over the dense cost, in (0, 1], met to one part in a thousand.
        units: weight name -> in how many units (blocks) it is masked, where these are not single weights.

    Raises:
        AllocationError: a budget that this distribution cannot meet, with what it can.
    """
    macs = {site.name: 0 for site in sites}
    for node in nodes:
        if node.weight in macs:
            macs[node.weight] += node.macs
    other_macs = sum(node.macs for node in nodes) - sum(macs.values())
    sizes = {site.name: site.numel for site in sites} | dict(units or {})

    def allocated(sparsity: float) -> dict[str, float]:
        return allocate_sparsity(
            sites, sparsity, distribution, dense=dense, explicit=explicit, power=power, dense_inside=dense_inside
        )

    return solve(sizes, flops, allocated, macs, other_macs)
