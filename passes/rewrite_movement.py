"""New arguments for movements whose tensors lose channels: a function a family of operations."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxsparse.core.graphs import attribute, operand
from fxsparse.core.records import record_of

from .channel_movement import is_set_by_layers, movement_name, padding_of, size_arguments

Arguments = tuple[Any, tuple, dict[str, Any]]
"""`(target, args, kwargs)` of the new call; nodes among the arguments are those of the old graph."""


def new_arguments(rewriter: Any, node: fx.Node, boxes: list[Any]) -> Arguments | None:
    """How a movement is called on its cut operands to give results of these boxes; None where that is not known.

    Args:
        rewriter: knows what is kept of every node.
        node: of the old graph.
        boxes: of the tensors in its result.
    """
    family = _FAMILIES.get(movement_name(rewriter.model, node))
    if family is None:
        return node.target, node.args, dict(node.kwargs)
    return family(rewriter, node, boxes)


def _number(item: Any) -> Any:
    """What a plain argument is for the example."""
    return record_of(item).spec if isinstance(item, fx.Node) else item


def _shape_after(rewriter: Any, node: fx.Node, boxes: list[Any]) -> list[int]:
    shape = rewriter.labels[node.name].shape
    return [size if kept is None else len(kept) for size, kept in zip(shape, boxes[0], strict=True)]


def _sized(rewriter: Any, node: fx.Node, boxes: list[Any]) -> Arguments | None:
    """view, reshape, expand: a size of what is cut becomes the new number; one that is computed becomes -1."""
    name = movement_name(rewriter.model, node)
    sizes = size_arguments(node, name)
    if sizes is None:
        return None
    after = _shape_after(rewriter, node, boxes)
    offset = len(after) - len(sizes)
    inferred = any(_number(size) == -1 for size in sizes)
    for position, size in enumerate(sizes):
        if boxes[0][position + offset] is None or _number(size) == -1:
            continue
        if isinstance(size, fx.Node) and not is_set_by_layers(size, rewriter.labels_of):
            if inferred or name not in ("view", "reshape"):
                return None
            sizes[position], inferred = -1, True
        else:
            sizes[position] = after[position + offset]
    if node.op == "call_method":
        return node.target, (node.args[0], *sizes), {}
    return node.target, (operand(node, 0, "input"), tuple(sizes)), {}


def _unflatten(rewriter: Any, node: fx.Node, boxes: list[Any]) -> Arguments | None:
    if node.op == "call_module":
        module = attribute(rewriter.model, str(node.target))
        dim, sizes = module.dim, module.unflattened_size
    else:
        dim, sizes = _number(operand(node, 1, "dim")), operand(node, 2, "sizes")
    input = operand(node, 0, "input")
    dim %= rewriter.labels[input.name].ndim
    after = _shape_after(rewriter, node, boxes)
    new = tuple(size if boxes[0][dim + at] is None else after[dim + at] for at, size in enumerate(sizes))
    return torch.unflatten, (input, dim, new), {}


def _sections(rewriter: Any, node: fx.Node, boxes: list[Any]) -> Arguments | None:
    """split, chunk: one section for every piece, as long as what is left of it."""
    input = operand(node, 0, "tensor") or operand(node, 0, "input")
    dim = _number(operand(node, 2, "dim")) or 0
    if all(box[dim] is None for box in boxes):
        return node.target, node.args, dict(node.kwargs)
    pieces = rewriter.labels[node.name]
    sizes = [piece.shape[dim] if box[dim] is None else len(box[dim]) for piece, box in zip(pieces, boxes, strict=True)]
    return torch.split, (input, sizes, dim), {}


def _kept_before(kept: Tensor | None, end: int) -> int:
    return end if kept is None else int((kept < end).sum())


def _narrow(rewriter: Any, node: fx.Node, boxes: list[Any]) -> Arguments | None:
    input = operand(node, 0, "input")
    dim, start, length = (_number(operand(node, at, name)) for at, name in ((1, "dim"), (2, "start"), (3, "length")))
    kept = rewriter.box(input.name)[dim]
    if kept is None:
        return node.target, node.args, dict(node.kwargs)
    first = _kept_before(kept, start)
    return torch.narrow, (input, dim, first, _kept_before(kept, start + length) - first), {}


def _select(rewriter: Any, node: fx.Node, boxes: list[Any]) -> Arguments | None:
    input = operand(node, 0, "input")
    dim, index = _number(operand(node, 1, "dim")), _number(operand(node, 2, "index"))
    kept = rewriter.box(input.name)[dim]
    if kept is None:
        return node.target, node.args, dict(node.kwargs)
    return torch.select, (input, dim, _kept_before(kept, index % rewriter.labels[input.name].shape[dim])), {}


def _getitem(rewriter: Any, node: fx.Node, boxes: list[Any]) -> Arguments | None:
    """Slices and positions along what is cut move; the rest stays."""
    input, index = node.args
    items = index if isinstance(index, tuple) else (index,)
    box, shape = rewriter.box(input.name), rewriter.labels[input.name].shape
    named = sum(item is not None and item is not Ellipsis for item in items)
    new: list[Any] = []
    dim = 0
    for item in items:
        if item is Ellipsis:
            dim += len(shape) - named
        if item is None or item is Ellipsis:
            new.append(item)
            continue
        kept = box[dim]
        if kept is None:
            new.append(item)
        elif isinstance(item, slice):
            start, stop, step = slice(*map(_number, (item.start, item.stop, item.step))).indices(shape[dim])
            if step != 1:
                return None
            new.append(slice(_kept_before(kept, start), _kept_before(kept, stop)))
        elif isinstance(_number(item), int):
            new.append(_kept_before(kept, _number(item) % shape[dim]))
        else:
            return None
        dim += 1
    return node.target, (input, tuple(new) if isinstance(index, tuple) else new[0]), {}


def _pad(rewriter: Any, node: fx.Node, boxes: list[Any]) -> Arguments | None:
    input = operand(node, 0, "input")
    amounts, mode = padding_of(rewriter, node)
    labels, box = rewriter.labels[node.name], boxes[0]
    if amounts is None:
        return None
    new = list(amounts)
    for index in range(0, len(amounts), 2):
        dim = labels.ndim - 1 - index // 2
        left, right = amounts[index : index + 2]
        if box[dim] is not None and (left or right):
            new[index] = _kept_before(box[dim], left)
            new[index + 1] = len(box[dim]) - _kept_before(box[dim], labels.shape[dim] - right)
    if new == list(amounts):
        return node.target, node.args, dict(node.kwargs)
    value = attribute(rewriter.model, str(node.target)) if node.op == "call_module" else None
    constant = getattr(value, "value", 0.0) if value is not None else operand(node, 3, "value")
    return F.pad, (input, new, mode, constant), {}


_FAMILIES: dict[str, Callable[[Any, fx.Node, list[Any]], Arguments | None]] = {
    **dict.fromkeys(("view", "reshape", "expand", "broadcast_to"), _sized),
    **dict.fromkeys(("unflatten", "Unflatten"), _unflatten),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _sections),
    "narrow": _narrow,
    "select": _select,
    "getitem": _getitem,
    "pad": _pad,
}
"""Movements that need new arguments; all others are called as they were."""
