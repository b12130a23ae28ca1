"""A `no_grad` region inside forward leaves no mark in a graph; what it does is recorded operation by operation.

Under `no_grad`, the result of an operation has the same value and no history. So every floating-point result that
was made from floating-point values is followed by `.detach()`, which is the same for the gradients of everything.
A change in place is the exception: the tensor keeps its history, so it is refused. `export` hands over regions of their
own, where `written_operands` says what an operation changes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..core.graphs import has_effect

IN_PLACE = "an in-place change inside a no_grad region would have other gradients in a graph"
INFERENCE_MODE = "an inference_mode region inside forward would be lost; use no_grad there"


def detached(tracer: Any, node: fx.Node, value: Any) -> Any:
    """What forward gets for a node recorded under `no_grad`, whose value for the example is `value`.

    Raises:
        CaptureError: an operation in the region whose effect on gradients cannot be recorded this way.
    """
    if torch.is_inference_mode_enabled():
        raise tracer.refused(INFERENCE_MODE)
    carries = node.op in ("get_attr", "call_module") or any(
        _may_carry(tracer.results.get(source)) for source in node.all_input_nodes
    )
    if not carries or node.op == "get_attr":
        return tracer.wrapped(node, value)
    if node.op != "call_module" and has_effect(node):
        raise tracer.refused(IN_PLACE)
    if not _may_carry(value):
        return tracer.wrapped(node, value)
    if isinstance(value, Tensor):
        proxy = tracer.wrapped(node, value)
        with torch.enable_grad():
            return proxy.detach()
    if type(value) in (tuple, list):  # of split, chunk and their like
        whole = tracer.wrapped(node, value)
        with torch.enable_grad():
            return type(value)(
                whole[index].detach() if isinstance(item, Tensor) else whole[index] for index, item in enumerate(value)
            )
    raise tracer.refused(f"a {type(value).__name__} is made inside a no_grad region, which a graph would lose")


def _may_carry(value: Any) -> bool:
    """Whether gradients may flow through a value at some call: it holds a floating-point tensor."""
    return any(
        isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
        for leaf in pytree.tree_leaves(value)
    )


def storages(values: Any) -> set[int]:
    """The memory of the floating-point tensors among fake values, which views share with what they show."""
    leaves = pytree.tree_leaves(values)
    return {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor) and _may_carry(leaf)}


def written_operands(overload: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments that an ATen operation changes in place, by its schema."""
    for position, argument in enumerate(overload._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[position] if position < len(args) else kwargs.get(argument.name)
