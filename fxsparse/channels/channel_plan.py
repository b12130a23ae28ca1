"""From a captured model and a budget to its channel sites, their numbers of atoms, and the first masks."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..core.allocation import DISTRIBUTIONS
from ..core.channel_allocation import (
    allocate_channels,
    extents_of,
    given_fractions,
    kept_elements,
    raw_fractions,
)
from ..core.channel_sites import Alive, ChannelPlan, ChannelSite, alive_along, alive_in, structured_mask
from ..core.errors import AllocationError, SelectionError
from ..core.masking import seeded_generator
from ..core.records import Captured, WeightSite
from ..passes.count_flops import count_flops
from ..passes.find_channel_sites import find_channel_sites, output_weights
from ..passes.group_channels import group_channels, label_channels
from ..passes.try_removal import try_removal
from .analysis import opened, refuse_opaque


def plan_channels(
    captured: Captured,
    sites: Sequence[WeightSite],
    *,
    density: float,
    flops: bool = False,
    distribution: str | Mapping[str, float] = "erk",
    dense: Collection[str] = (),
    explicit: Mapping[str, float] | None = None,
    power: float = 1.0,
) -> ChannelPlan:
    """Which channels training may drop, and how many of each group stay.

    Args:
        captured: the model with shapes and without masks; left as it is.
        sites: its masked weights.
        density: share of the sites' parameters to keep, counted when both sides of every weight have shrunk; the
            weights that make the model's outputs are left out of the count.
        flops: `density` is the share of the model's forward FLOPs instead, everything counted.
        distribution, dense, explicit, power: as for `sparsify`. A mapping, and `explicit`, give the share of channels
            to remove by the weight that makes them. Under `"uniform"` the first weight is dense.

    Raises:
        SelectionError: no channel can be dropped, or a name that makes no channels.
        AllocationError: the budget is out of reach.
    """
    if flops and not 0.0 < density <= 1.0:
        raise AllocationError(f"flops: {density!r} is outside (0, 1]; 0.2 asks for a fifth of the dense FLOPs")
    refuse_opaque(captured, "drop channels of")
    labelled = label_channels(opened(captured))
    try_removal(labelled)
    groups = group_channels(labelled)
    if distribution == "uniform":
        dense = {*dense, sites[0].name}
    found, stays = find_channel_sites(groups, sites, dense)
    outside = output_weights(groups) & {site.name for site in sites}
    shapes = {site.name: site.shape for site in sites}
    given = given_fractions(found, explicit or {}, "explicit")
    if isinstance(distribution, str):
        raw = raw_fractions(found, shapes, distribution, power)
    else:
        given = given_fractions(found, distribution, "distribution") | given
        missing = [site.producers[0] for site in found if site.name not in given]
        if missing:
            raise SelectionError(
                f"distribution: no sparsity given for the channels of {', '.join(missing)}; give all groups, or use "
                f"explicit= beside one of {', '.join(DISTRIBUTIONS)}"
            )
        raw = raw_fractions(found, shapes, "uniform")
    other = 0.0
    costs: dict[str, float] | None = None
    if flops:
        nodes = count_flops(captured.model, captured.graphs["eval"], {})
        costs = dict.fromkeys(shapes, 0.0)
        for node in nodes:
            if node.weight in costs:
                costs[node.weight] += node.macs
        other = sum(node.macs for node in nodes) - sum(costs.values())
    elif outside:
        shapes = {name: shape for name, shape in shapes.items() if name not in outside}
    if not shapes:
        raise AllocationError("every weight makes an output of the model; there is no budget to meet")
    extents = extents_of(found, shapes, costs)
    if len(given) == len(found):  # nothing is left to solve for
        fixed = {site.name: max(1, round(given[site.name] * site.size)) for site in found}
        return ChannelPlan(tuple(found), fixed, stays, frozenset(outside))
    targets = allocate_channels(found, extents, raw, density, given=given, other=other)
    return ChannelPlan(tuple(found), targets, stays, frozenset(outside))


def planned_sparsities(plan: ChannelPlan, sites: Sequence[WeightSite], kept: Mapping[str, int]) -> dict[str, float]:
    """Weight name -> its sparsity when each channel site keeps that many atoms."""
    extents = extents_of(plan.sites, {site.name: site.shape for site in sites})
    return {site.name: 1.0 - kept_elements(extents[site.name], plan.sites, kept) / site.numel for site in sites}


def first_channels(plan: ChannelPlan, seed: int, start_dense: bool) -> dict[str, Tensor]:
    """Channel site -> which atoms a run starts with: all, or as many as it is given, drawn without replacement."""
    alive = {}
    for site in plan.sites:
        kept = torch.ones(site.size, dtype=torch.bool)
        if not start_dense:
            order = torch.randperm(site.size, generator=seeded_generator(seed, "mask", site.name))
            kept[order[plan.targets[site.name] :]] = False
        alive[site.name] = kept
    return alive


def masks_of(channel_sites: Sequence[ChannelSite], sites: Sequence[WeightSite], alive: Alive) -> dict[str, Tensor]:
    """Weight name -> its mask (bool) with these channels."""
    return {
        site.name: structured_mask(alive_along(channel_sites, alive, site.name, site.shape), site.shape)
        for site in sites
    }


def channels_in(plan: ChannelPlan, sites: Sequence[WeightSite], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which channels given masks leave; `SelectionError` unless they are masks of whole channels."""
    alive = {site.name: alive_in(site, masks) for site in plan.sites}
    for site in plan.sites:
        if not bool(alive[site.name].any()):
            raise SelectionError(f"masks: nothing is left of the {site.name}; one has to stay")
    for name, mask in masks_of(plan.sites, sites, alive).items():
        if not torch.equal(mask, masks[name].cpu()):
            raise SelectionError(f"masks: that of {name} does not consist of whole channels; use granularity='weight'")
    return alive


def elements_left(
    plan: ChannelPlan, shapes: Mapping[str, tuple[int, ...]], planned: Sequence[tuple[int, Mapping[str, int]]]
) -> list[tuple[int, dict[str, int]]]:
    """From numbers of active channels a site, by step, to numbers of active elements a weight."""
    extents = extents_of(plan.sites, shapes)
    return [
        (step, {name: kept_elements(extent, plan.sites, kept) for name, extent in extents.items()})
        for step, kept in planned
    ]
