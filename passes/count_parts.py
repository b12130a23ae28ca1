"""Counts the active elements of a part of a masked weight: the part is taken of the mask itself."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsparse.core.graphs import attribute
from fxsparse.core.masking import apply_mask
from fxsparse.core.packed_masks import unpack_mask
from fxsparse.core.records import record_of
from fxsparse.core.weight_operands import shape_of


@torch.no_grad()
def active_in_part(root: nn.Module, weight: fx.Node, active: int) -> int | None:
    """How many elements of a weight are active, by the mask that the graph reads.

    Args:
        weight: a view of a part of one parameter (`core/weight_origin.py`).
        active: how many elements of the whole parameter count as active.

    Returns:
        None where the graph has no mask, or one that has no contents or another number of active elements.
    """
    masks = [node for node in _before(weight) if node.target is apply_mask]
    if len(masks) != 1:
        return None
    stored = attribute(root, str(masks[0].args[1].target))  # type: ignore[union-attr]
    mask = unpack_mask(stored, torch.Size(shape_of(masks[0])))
    if mask.is_meta or int(mask.sum()) != active:
        return None
    return int(_taken(weight, mask).sum())


def _before(node: fx.Node) -> list[fx.Node]:
    found = [node]
    while found[-1].op in ("call_function", "call_method") and found[-1].target is not apply_mask:
        source = found[-1].args[0]
        if not isinstance(source, fx.Node):
            break
        found.append(source)
    return found


def _taken(node: fx.Node, mask: Tensor) -> Any:
    """What a chain of views gives for the mask in the place of the weight."""
    if node.target is apply_mask:
        return mask
    source, *args = node.args
    args, kwargs = fx.map_arg((args, node.kwargs), lambda size: record_of(size).spec)
    value = _taken(source, mask)  # type: ignore[arg-type]
    if node.op == "call_method":
        return getattr(value, str(node.target))(*args, **kwargs)
    return node.target(value, *args, **kwargs)  # type: ignore[operator]
