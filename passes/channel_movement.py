"""Labels through operations that only move data: they are executed on the labels themselves."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxsparse.core.channel_labels import LabelSource, compressed, varying_dims
from fxsparse.core.channel_rules import plain_name
from fxsparse.core.graphs import attribute, has_effect, operand, operation_name
from fxsparse.core.labelled_model import TensorReference
from fxsparse.core.records import TensorSpec, record_of

from .label_run import LabelRun


def move_labels(run: LabelRun, node: fx.Node) -> Any:
    """The labels of the result, or None where the operation takes something that is no plain movement."""
    if node.op != "call_module" and has_effect(node):
        return None  # transpose_ and its like: the tensor itself gets another shape
    args, kwargs = run.operands((node.args, node.kwargs))
    name = movement_name(run.root, node)
    if name == "pad":
        return _padded(run, node, args, kwargs)
    if name == "getitem":
        if not isinstance(args[1], tuple):
            args = (args[0], (args[1],))
        index = [_index(item) for item in args[1]]
        if any(item is _COMPUTED for item in index):
            return None
        args = (args[0], tuple(index))
    dynamic = _open_sizes(run, node, name)
    args, kwargs = run.elements((args, kwargs))
    if name == "repeat_interleave" and not isinstance(operand(node, 1, "repeats"), int):
        return None
    moved = execute(run.root, node, args, kwargs)
    result = pytree.tree_map(lambda leaf: compressed(leaf) if isinstance(leaf, Tensor) else leaf, moved)
    if not _fits(result, record_of(node).spec):
        return None
    if dynamic and isinstance(result, Tensor):
        run.pin_where_varying(result, dynamic, f"{node.name} computes this size from sizes of the input")
    return result


def movement_name(root: Any, node: fx.Node) -> str:
    """The short name of a movement; of a module, that of what its forward calls."""
    if node.op != "call_module":
        return str(node.args[1]) if node.target is getattr else plain_name(operation_name(node))
    kind = type(attribute(root, str(node.target))).__name__
    return "pad" if "Pad" in kind else kind


def execute(root: Any, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Runs a movement on integer tensors."""
    with torch.no_grad():
        if node.op == "call_module":
            return attribute(root, str(node.target))(*args, **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)
        method = "reshape" if node.target == "view" else str(node.target)  # labels are expanded, the tensor is not
        return getattr(args[0], method)(*args[1:], **kwargs)


def _fits(result: Any, spec: Any) -> bool:
    """Whether what came out has the shapes that the node has."""
    ours = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    theirs = pytree.tree_leaves(spec, is_leaf=lambda leaf: isinstance(leaf, TensorSpec))
    theirs = [leaf for leaf in theirs if isinstance(leaf, TensorSpec)]
    return [tuple(leaf.shape) for leaf in ours] == [tuple(leaf.shape) for leaf in theirs]


def _index(item: Any) -> Any:
    """One part of an index: a plain one, the contents of an integer buffer, or `_COMPUTED`."""
    if isinstance(item, TensorReference):
        is_position = item.tensor.dtype in (torch.int64, torch.int32) and not item.tensor.is_meta
        return item.tensor.detach().cpu() if is_position else _COMPUTED
    return _COMPUTED if isinstance(item, Tensor) else item


_COMPUTED = object()


# -- padding ----------------------------------------------------------------------------------------------


def _padded(run: LabelRun, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Along positions a channel is padded with itself; along channels, constant padding makes new ones."""
    spec = record_of(node).spec
    amounts, mode = padding_of(run, node)
    input = run.elements(args[0] if args else kwargs["input"])
    if amounts is None or not isinstance(input, Tensor):
        return None
    padded_dims = {-1 - index // 2 for index, amount in enumerate(amounts) if amount}
    if not {dim % input.ndim for dim in padded_dims} & set(varying_dims(input)):
        narrow = input
        for dim in padded_dims:
            narrow = narrow.narrow(dim, 0, 1)
        return narrow.expand(spec.shape)
    if mode != "constant" or len(padded_dims) != 1 or min(amounts) < 0:
        return None
    (dim,) = padded_dims
    result = F.pad(input, amounts, value=-1)
    made = run.space.labels(LabelSource(node.name, None, "node"), (spec.shape[dim],))
    shape = [1] * len(spec.shape)
    shape[dim] = -1
    return compressed(torch.where(result < 0, made.view(shape), result))


def padding_of(run: Any, node: fx.Node) -> tuple[list[int] | None, str]:
    """`(amounts, mode)` as `F.pad` takes them."""
    if node.op == "call_module":
        module = attribute(run.root, str(node.target))
        kind = type(module).__name__
        mode = "constant" if kind.startswith(("Zero", "Constant")) else kind.partition("Pad")[0].lower()
        return list(module.padding), mode
    amounts = run.operands(operand(node, 1, "pad"))
    mode = operand(node, 2, "mode") or "constant"
    if not isinstance(amounts, (tuple, list)) or not all(isinstance(amount, int) for amount in amounts):
        return None, mode
    return list(amounts), mode


# -- sizes ------------------------------------------------------------------------------------------------

SIZED = frozenset(["view", "reshape", "expand", "broadcast_to", "unflatten", "repeat", "tile"])
"""Movements that are given sizes, which have to be written anew when channels go."""


def _open_sizes(run: LabelRun, node: fx.Node, name: str) -> list[int]:
    """Dimensions of a result whose size depends on the batch or on positions, and cannot be left to torch.

    One such size may be written as -1 where no other is.
    """
    sizes = size_arguments(node, name)
    if sizes is None:
        return []

    def labels_of(source: fx.Node) -> Any:
        return run.elements(run.values[source])

    open_dims = [
        dim for dim, size in enumerate(sizes) if isinstance(size, fx.Node) and not is_set_by_layers(size, labels_of)
    ]
    may_infer = name in ("view", "reshape") and not any(run.operands(size) == -1 for size in sizes)
    return [] if may_infer else open_dims


def size_arguments(node: fx.Node, name: str) -> list[Any] | None:
    """The sizes that a movement is given, one a dimension of its result."""
    if name not in ("view", "reshape", "expand", "broadcast_to"):
        return None
    given = node.args[1:] or (node.kwargs.get("shape") or node.kwargs.get("size"),)
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = tuple(given[0])
    return list(given)


def is_set_by_layers(size: fx.Node, labels_of: Callable[[fx.Node], Any]) -> bool:
    """Whether a computed size depends on numbers of channels alone, which a layer sets once and for all."""
    if size.op == "call_method" and size.target == "size" and len(size.args) == 2:
        labels = labels_of(size.args[0])
        return isinstance(labels, Tensor) and size.args[1] % labels.ndim in varying_dims(labels)
    if size.op != "call_function" or not size.all_input_nodes:
        return False
    return all(is_set_by_layers(source, labels_of) for source in size.all_input_nodes)
