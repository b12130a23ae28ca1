"""`lower(backend="cuda")`: a module that only runs, its 2:4 weights on PyTorch's semi-structured kernels."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..core.errors import FxSparseWarning
from ..core.records import Captured, TensorSpec, WeightSite
from ..kernels import semi_structured
from ..kernels.semi_structured import SemiStructuredKernels
from ..passes.find_lowerable import SparseCall
from ..passes.find_semi_structured import find_semi_structured
from ..passes.keep_views import keep_views
from ..passes.lower_semi_structured import lower_semi_structured
from .decisions import Decision, captured_by, wanted_layers
from .inference import LoweredModule, module_of

TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far, relative to the largest output, sums in another order may end in a deep network."""


@torch.no_grad()
def lower_for_cuda(module: Any, example: tuple, layers: str | Sequence[str]) -> LoweredModule:
    """A copy of a masked module for inference on a CUDA device.

    Args:
        module: a `LowerableModule` on the device, in the dtype that it is to run in.
        example: specs of an example input; device and dtype are the module's.
        layers: `"auto"` and `"all"`: every weight that the kernels take; or globs of names.

    Raises:
        ConfigError: a device without such kernels, or `layers` that is none of these.
        SelectionError: a glob that matches no weight.
    """
    first = module.get_parameter(module.sites[0].name)
    kernels = semi_structured.find_kernels(first.device)
    own = copy.deepcopy(module).raise_()
    own.apply_masks_()
    captured = captured_by(own, like(example, first))
    decisions, calls = decide_semi_structured(captured, own.sites, own.masks, layers, kernels)
    graph = lower_semi_structured(captured.graphs["eval"], calls)
    keep_views(captured.model, graph)
    weights = {name: own.get_parameter(name) for name in calls}
    packed = {name: kernels.pack(weight.flatten(1).contiguous()) for name, weight in weights.items()}
    lowered = module_of(captured, graph, packed, decisions)
    if not calls:
        reason = next(decision.reason for decision in decisions)
        warnings.warn(
            f"no weight runs on semi-structured kernels ({decisions[0].name}: {reason}); report() has all reasons",
            FxSparseWarning,
            stacklevel=5,  # who called `lower`
        )
    return lowered


def decide_semi_structured(
    captured: Captured,
    sites: Sequence[WeightSite],
    masks: Mapping[str, Tensor],
    layers: str | Sequence[str],
    kernels: SemiStructuredKernels,
) -> tuple[list[Decision], dict[str, list[SparseCall]]]:
    """What is done with every site, and the calls of those that are packed. There is no cost model: what can be, is."""
    calls, reasons = find_semi_structured(captured, sites)
    wanted = wanted_layers(layers, [site.name for site in sites])
    decisions = []
    for site in sites:
        mask = masks[site.name]
        reason = reasons.get(site.name) or why_dense(captured.model.get_parameter(site.name), mask, kernels)
        if not reason and wanted is not None and site.name not in wanted:
            reason = "not among the layers that were asked for"
        decisions.append(Decision(site.name, not reason, reason, float(mask.float().mean())))
    return decisions, {each.name: calls[each.name] for each in decisions if each.lowered}


def why_dense(weight: Tensor, mask: Tensor, kernels: SemiStructuredKernels) -> str:
    """Why a weight, (out, in, 1, ...), is not for the kernels; empty where it is. Waits for the device."""
    rows, columns = weight.shape[:2]
    if bool(mask.all()):
        return "no weight of it is masked out"
    if not is_two_of_four(mask):
        return "its mask is not 2:4 along the input dimension"
    if weight.device != kernels.device:
        return f"it is on {weight.device}, and the kernels are for {kernels.device}"
    if weight.dtype not in kernels.multiples:
        return f"it is {str(weight.dtype).removeprefix('torch.')}; convert the module first: sparse.to(torch.bfloat16)"
    row_multiple, column_multiple = kernels.multiples[weight.dtype]
    if rows % row_multiple or columns % column_multiple:
        return f"{kernels.name} takes multiples of {row_multiple}x{column_multiple}, and it is {rows}x{columns}"
    return ""


def is_two_of_four(mask: Tensor) -> bool:
    """Whether at most 2 of every 4 consecutive positions along the input dimension of (out, in, ...) are active."""
    if mask.shape[1] % 4:
        return False
    return bool((mask.unflatten(1, (-1, 4)).sum(2) <= 2).all())


def like(example: tuple, weight: Tensor) -> Any:
    """Specs of an example with a weight's device, and its dtype where they are floating point."""

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, TensorSpec):
            return leaf
        dtype = weight.dtype if leaf.dtype.is_floating_point else leaf.dtype
        return replace(leaf, dtype=dtype, device=weight.device)

    return pytree.tree_map(own, example, is_leaf=lambda leaf: isinstance(leaf, TensorSpec))
