"""`sparsify`: the passes in their order."""

import dataclasses
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .channels.channel_plan import channels_in, first_channels, masks_of, plan_channels, planned_sparsities
from .channels.narrowing import narrow
from .core.channel_sites import ChannelPlan
from .core.errors import (
    AllocationError,
    ConfigError,
    FxSparseWarning,
    InputError,
    SelectionError,
    check_number,
    nearest,
)
from .core.granularity import (
    SINGLE_WEIGHTS,
    Given,
    Granularity,
    UnitLayout,
    check_groups,
    check_units,
    groups_of,
    layouts_of,
)
from .core.records import Captured, WeightSite
from .passes.allocate_sparsity import allocate_sparsity
from .passes.annotate_shapes import annotate_shapes
from .passes.count_flops import count_flops
from .passes.count_units import count_units
from .passes.find_sites import find_sites
from .passes.select_sites import Selectors, select_sites
from .passes.solve_flop_budget import solve_flop_budget
from .passes.trace import trace
from .passes.verify import verify as verify_outputs
from .runtime.granularity import check_goal, check_granularity, check_movement
from .runtime.methods import METHODS, Method, make_method
from .runtime.methods import method_options as list_options
from .runtime.schedule import UpdateSchedule
from .runtime.semantics import Semantics, make_semantics, preset_of
from .sparse_module import SparseModule


def sparsify(
    model: nn.Module,
    example_input: Any,
    method: str | Method = "rigl",
    *,
    sparsity: float | None = None,
    flops: float | None = None,
    distribution: str | Mapping[str, float] = "erk",
    drop_fraction: float = 0.3,
    update_interval: int = 100,
    stop_fraction: float = 0.75,
    decay: str = "cosine",
    decay_power: float = 3.0,
    redistribution: str | None = None,
    semantics: str | Semantics | Mapping[str, Any] = "paper",
    masks: Mapping[str, Tensor] | None = None,
    include: Selectors | None = None,
    exclude: Selectors = (),
    dense: Selectors = (),
    explicit: Mapping[str, float] | None = None,
    power: float = 1.0,
    granularity: Given = "weight",
    pack_masks: bool = False,
    seed: int = 0,
    capture: str = "auto",
    verify: bool = True,
    **method_options: Any,
) -> SparseModule:
    """Turns a model into a masked `torch.fx` GraphModule that trains sparsely in the user's own loop.

    The model is captured on a copy and never touched. Build the optimizer from the result's parameters:

        sparse = fxsparse.sparsify(model, example_input)
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
        sparse.attach(optimizer, total_steps=97_656)

    Args:
        model: any module; capture tells by name what it cannot take.
        example_input: a tensor, a tuple of positional arguments, or a dict of keyword arguments, on the
            model's device. Its sizes decide control flow on shapes and the FLOP counts.
        method: a name from `fxsparse.methods()`, or a `Method`.
        sparsity: fraction of the site's weights to remove, in [0, 1); 0.9 without a budget in `flops`.
        flops: instead of `sparsity`: forward FLOPs over those of the dense model, in (0, 1]; the sparsity is
            solved for, such that the distribution meets it to one part in a thousand.
        distribution: `"uniform"`, `"er"`, `"erk"`, or a mapping from every weight name to its sparsity.
        drop_fraction: fraction of the active connections rewired at first (the paper's alpha).
        update_interval: optimizer steps between rewirings (delta_t).
        stop_fraction: part of the run after which masks stay (the paper's T_end over the total).
        decay: how the drop fraction falls: `"cosine"`, `"constant"`, `"linear"`, `"inverse_power"`.
        decay_power: exponent of the inverse power.
        redistribution: for a method that grows, by what connections move between the layers: the mean magnitude of
            their active weights' `"gradient"` or `"momentum"`, or `"none"`; None is the method's own way.
        semantics: where published implementations differ: the preset `"paper"`, `"rigl-tf"` or `"report"`, a
            `Semantics`, or a mapping of its choices, such as `{"preset": "report", "rounding": "floor"}`.
        masks: weight name -> bool mask of every site, in place of random ones; their densities then take the place of
            `sparsity` and `distribution`. `method="lottery"` needs them.
        include, exclude, dense: globs of weight names, module names, `nn.Module` types, and `"first"`,
            `"last"`, `"depthwise"`. Excluded weights have no mask and are in no budget; dense ones stay at
            density 1 inside the budget.
        explicit: weight name or glob -> sparsity, for sites that are given rather than solved.
        power: exponent on the ER and ERK proportions.
        granularity: what is dropped and grown as one: single weights (`"weight"`); blocks of them, such as `(4, 1)` or
            `"4x1"`: those of 4 consecutive output channels at one input position; or whole channels (`"channel"`),
            which can be cut out of the graph. `sparsity` is then counted as after cutting them out. `"2:4"` (N:M): of
            every 4 consecutive weights along the input dimension 2 are active; that fixes the sparsity, 1 - N/M, of
            every weight whose input dimension is a multiple of M, and leaves the others dense.
        pack_masks: store masks as bits, an eighth of the memory; they are unpacked one at a time where they are read.
            `state_dict` has bool masks all the same. Not for channels.
        seed: of the initial masks and of every random choice while rewiring.
        capture: how the graph is made: `"concrete"` (a tracer that knows the example), `"export"` (`torch.export`),
            or `"auto"`, the first of them that takes the model; `sparse.capture` says which it was.
        verify: run the example through both models, in eval and train mode, and refuse a difference.
        method_options: options of the method by name, such as `momentum="optimizer"` for `"snfs"`.

    Raises:
        FxSparseError: what is wrong and what would be accepted; nothing was changed.
    """
    method = _method(method, semantics, redistribution, method_options)
    semantics = make_semantics(semantics)
    chosen = check_granularity(method, granularity, semantics)
    if sparsity is not None and flops is not None:
        raise ConfigError("sparsity and flops: give one of the two, not both")
    if masks is not None and (sparsity is not None or flops is not None):
        raise ConfigError("masks bring their own densities; leave sparsity and flops out")
    if method.needs_masks and masks is None:
        raise ConfigError(f"method {method.name} needs masks=, those that a pruning run ended with")
    if masks is not None and not isinstance(masks, Mapping):
        raise ConfigError(f"masks: a {type(masks).__name__}; give a mapping from weight names to bool tensors")
    if masks is not None and (dense or explicit):
        raise ConfigError(f"masks bring their own densities; leave {'dense' if dense else 'explicit'} out")
    if masks is not None and method.initial_sparsity(0.5) != 0.5:
        raise ConfigError(f"method {method.name} starts dense; masks= is for a method that starts sparse")
    fixed = check_goal(
        chosen, sparsity=sparsity, flops=flops, distribution=distribution, explicit=explicit, power=power
    )
    if sparsity is None:
        sparsity = 0.9
    if not isinstance(pack_masks, bool):
        raise ConfigError(f"pack_masks: {pack_masks!r} is neither True nor False")
    if pack_masks and chosen.kind == "channel":
        raise ConfigError("pack_masks: masks of whole channels are not stored as bits; leave it out")
    check_number("seed", seed, whole=True)
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; give an instance of nn.Module: {model!r}"[:200])
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real) or not 0.0 <= sparsity < 1.0:
        raise AllocationError(f"sparsity: {sparsity!r} is outside [0, 1); 0.9 removes nine weights of ten")
    schedule_options: dict[str, Any] = {
        "drop_fraction": drop_fraction,
        "update_interval": update_interval,
        "stop_fraction": stop_fraction,
        "decay": decay,
        "decay_power": decay_power,
        "inclusive": semantics.end == "inclusive",
        "start": semantics.start,
    }
    UpdateSchedule.for_run(1, **schedule_options)  # refuses bad options before any work

    if method.changes_widths:
        goal: dict[str, Any] = {"sparsity": None if flops is not None else sparsity, "flops": flops}
        goal |= {"distribution": distribution, "explicit": explicit, "power": power, "semantics": semantics}
        goal |= {"include": include, "exclude": exclude, "dense": dense}
        model = _narrowed(model, example_input, seed, goal)
    captured = trace(model, example_input, capture)
    annotate_shapes(captured)
    sites, uncovered = find_sites(captured)
    sites, stay_dense, uncovered = select_sites(
        captured, sites, uncovered, include=include, exclude=exclude, dense=dense
    )
    channels = None
    layouts = layouts_of(chosen, sites)
    if chosen.kind == "channel":
        channels, sparsities, masks = _channels(
            captured,
            sites,
            method,
            masks,
            seed,
            sparsity=sparsity,
            flops=flops,
            distribution=distribution,
            dense=stay_dense,
            explicit=explicit,
            power=power,
        )
    elif masks is not None:
        sparsities = _sparsities_of(masks, sites, layouts, chosen)
        if fixed is not None:
            _check_group_masks(masks, sites, chosen)
    elif fixed is not None:
        sparsities = _in_groups(sites, chosen, fixed, stay_dense)
    elif not method.target_sparsity(sparsity):
        sparsities = {site.name: 0.0 for site in sites}
    else:
        goal = {
            "dense": stay_dense,
            "explicit": explicit,
            "power": power,
            "dense_inside": semantics.dense_sites == "inside",
        }
        if flops is not None:
            costs = count_flops(captured.model, captured.graphs["eval"], {})
            costs += count_units(captured.model, captured.units, {})
            units = {name: layout.units for name, layout in layouts.items()}
            sparsity = solve_flop_budget(costs, sites, flops, distribution, units=units, **goal)
        sparsities = allocate_sparsity(sites, sparsity, distribution, **goal)
    check_movement(method, layouts, sparsities)
    eager = captured.model
    sparse = SparseModule(
        *(captured, sites, uncovered, sparsities, method, schedule_options, seed),
        *(semantics, masks, channels, chosen, pack_masks),
    )
    if verify and not any(tensor.is_meta for tensor in sparse.parameters()):
        sparse.notes += verify_outputs(captured.name, eager, sparse, example_input)
    for note in sparse.notes:
        warnings.warn(note, FxSparseWarning, stacklevel=2)
    return sparse


def _method(
    method: str | Method, semantics: Any, redistribution: str | None, method_options: Mapping[str, Any]
) -> Method:
    """The method with its options; an option of neither the method nor `sparsify` is refused with near names."""
    own = set(inspect.signature(sparsify).parameters) - {"method_options"}
    options = dict(method_options)
    if redistribution is not None:
        options["redistribution"] = redistribution
    known = {entry.name for entry in dataclasses.fields(method)} if isinstance(method, Method) else set()
    if isinstance(method, str) and method in METHODS:
        known = set(list_options(method))
    for name in method_options:
        if (isinstance(method, Method) or method in METHODS) and name not in known:
            hint = nearest(name, [*own, *known])
            label = method if isinstance(method, str) else method.name
            raise ConfigError(f"sparsify takes no argument {name!r}, and method {label} no such option{hint}")
    return make_method(method, preset_of(semantics), **options)


def _channels(
    captured: Captured,
    sites: Sequence[WeightSite],
    method: Method,
    masks: Mapping[str, Tensor] | None,
    seed: int,
    *,
    sparsity: float,
    flops: float | None,
    dense: Sequence[str],
    **how: Any,
) -> tuple[ChannelPlan, dict[str, float], dict[str, Tensor]]:
    """The channel sites, the sparsities that follow for the weights, and the masks of the channels to start with."""
    if not method.target_sparsity(sparsity) or masks is not None:
        density = 1.0  # all channels, or those of the masks
    else:
        density = flops if flops is not None else 1.0 - sparsity
    plan = plan_channels(captured, sites, density=density, flops=flops is not None, dense=dense, **how)
    if masks is not None:
        _sparsities_of(masks, sites)
        alive = channels_in(plan, sites, masks)
        plan = replace(plan, targets={name: int(kept.sum()) for name, kept in alive.items()})
    else:
        alive = first_channels(plan, seed, start_dense=method.initial_sparsity(0.5) != 0.5)
    return plan, planned_sparsities(plan, sites, plan.targets), masks_of(plan.sites, sites, alive)


def _in_groups(
    sites: Sequence[WeightSite], granularity: Granularity, sparsity: float, dense: Sequence[str]
) -> dict[str, float]:
    """The sparsity of every site that has groups of M weights; the others, and those named dense, stay dense."""
    groups, reasons = groups_of(granularity, sites)
    if not groups:
        name, reason = next(iter(reasons.items()))
        raise SelectionError(f"granularity {granularity} fits no weight: {name} stays dense, since {reason}")
    return {site.name: sparsity if site.name in groups and site.name not in dense else 0.0 for site in sites}


def _check_group_masks(masks: Mapping[str, Tensor], sites: Sequence[WeightSite], granularity: Granularity) -> None:
    """`SelectionError` for a mask that is neither N of every M nor all of them."""
    groups, reasons = groups_of(granularity, sites)
    for name, mask in masks.items():
        if name in reasons and not bool(mask.all()):
            raise SelectionError(f"masks: {name} cannot be {granularity}: {reasons[name]}; its mask has to be all True")
        if name in groups and not bool(mask.all()):
            check_groups(name, mask, groups[name], granularity)


def _narrowed(model: nn.Module, example_input: Any, seed: int, goal: Mapping[str, Any]) -> nn.Module:
    """The model with channels removed at random, as many parameters left as a sparse one has active ones."""
    sparse = sparsify(model, example_input, "static", verify=False, **goal)
    return narrow(model, example_input, sparse.target_parameters, seed)


def _sparsities_of(
    masks: Mapping[str, Tensor],
    sites: Sequence[WeightSite],
    layouts: Mapping[str, UnitLayout] = MappingProxyType({}),
    granularity: Granularity = SINGLE_WEIGHTS,
) -> dict[str, float]:
    """What the given masks remove of each site's weights, or units; `SelectionError` unless they are its masks."""
    names = [site.name for site in sites]
    for name in masks:
        if name not in names:
            raise SelectionError(f"masks: {name!r} is not a weight site{nearest(name, names)}")
    for site in sites:
        mask = masks.get(site.name)
        if mask is None:
            raise SelectionError(f"masks: there is none for {site.name}; give all {len(sites)}, or exclude the weight")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != tuple(site.shape):
            kind = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise SelectionError(f"masks: {site.name} is {kind}; it takes a bool tensor of shape {tuple(site.shape)}")
    removed = {site.name: masks[site.name].logical_not() for site in sites}
    for name, layout in layouts.items():
        check_units(name, masks[name], layout, granularity)
        removed[name] = layout.gather(removed[name])
    return {name: int(units.sum()) / units.numel() for name, units in removed.items()}
