"""For inference: folds batch normalisation into the layer before it, and has a sparse kernel add and limit its result.

A lowered graph's `lowered_conv -> batch_norm -> add -> relu` becomes one call. Layers that stay dense take batch
normalisation into their weights as well.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxsparse.core.graphs import IN_PLACE_OPERATORS, attribute, copy_graph, operand, operation_name
from fxsparse.core.records import TensorSpec, record_of, update_record
from fxsparse.kernels.calls import fused_conv, fused_linear, lowered_conv, lowered_linear

_ADDITIONS = (operator.add, torch.add, operator.iadd)
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_LIMITS: dict[str, tuple[float | None, float | None]] = {
    "relu": (0.0, None),
    "relu_": (0.0, None),
    "relu6": (0.0, 6.0),
    "relu6_": (0.0, 6.0),
}


@dataclass(frozen=True)
class _Affine:
    """y = scale * x + shift, a number a channel; in double precision."""

    scale: Tensor
    shift: Tensor


@torch.no_grad()
def fuse_lowered(root: nn.Module, graph: fx.Graph) -> tuple[fx.Graph, dict[str, Tensor]]:
    """A copy of a lowered graph of eval mode, for inference alone.

    Args:
        root: what the graph's attributes and submodules refer to; not changed.
        graph: annotated with shapes.

    Returns:
        The graph, and its new tensors by the names under which it reads them.
    """
    fused = copy_graph(graph)
    tensors: dict[str, Tensor] = {}
    for node in list(fused.nodes):
        if node.target in (lowered_conv, lowered_linear):
            _fuse_sparse(root, node, tensors)
        elif node.target in _CONVOLUTIONS:
            _fold_dense(root, node, tensors)
    for node in reversed(list(fused.nodes)):
        if node.op == "get_attr" and not node.users:
            fused.erase_node(node)
    fused.lint()
    return fused, tensors


# -- sparse layers ----------------------------------------------------------------------------------------


def _fuse_sparse(root: nn.Module, node: fx.Node, tensors: dict[str, Tensor]) -> None:
    linear = node.target is lowered_linear
    x, weight, pattern, bias, _, _, _, shape, *settings = node.args
    block = settings[-1]
    starts = attribute(root, str(pattern[0].target))  # type: ignore[union-attr, index]
    values = attribute(root, str(weight.target)).detach()  # type: ignore[union-attr]
    added = None if bias is None else attribute(root, str(bias.target)).detach()  # type: ignore[union-attr]
    chain, residual = [node], None
    affine = None if linear else _batch_norm_after(root, node)
    if affine is not None:
        chain.append(_only_user(node))
        rows = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff().long())
        scale = affine.scale.reshape(-1, block)[rows].flatten()
        values, added = _scaled(values, scale), _shifted(added, affine, values.dtype)
    addition = None if linear else _addition_after(chain[-1])
    if addition is not None and _may_move(root, chain, addition[0]):
        chain.append(addition[0])
        residual = addition[1]
    limits = _limits_after(root, chain[-1])
    if limits is not None:
        if _may_move(root, chain, _only_user(chain[-1])):
            chain.append(_only_user(chain[-1]))
        else:
            limits = None
    low, high = limits or (None, None)
    name = node.name
    tensors[f"{name}_values"] = values.clone()
    for label, part in zip(("starts", "columns"), pattern, strict=False):  # type: ignore[arg-type]
        tensors[f"{name}_{label}"] = attribute(root, str(part.target))  # type: ignore[union-attr]
    if added is not None:
        tensors[f"{name}_bias"] = added.clone()
    graph = node.graph
    with graph.inserting_before(chain[-1]):
        own = {label: graph.create_node("get_attr", f"{name}_{label}") for label in ("values", "starts", "columns")}
        new_bias = graph.create_node("get_attr", f"{name}_bias") if added is not None else None
        given = (x, own["values"], [own["starts"], own["columns"]], new_bias)
        if linear:
            new = graph.call_function(fused_linear, (*given, shape[0], block, low, high))  # type: ignore[index]
        else:
            new = graph.call_function(fused_conv, (*given, residual, shape, *settings, low, high))
    _replace(chain, new)


def _may_move(root: nn.Module, chain: list[fx.Node], last: fx.Node) -> bool:
    """Whether nothing between a chain of nodes and one that comes to be a part of it changes tensors in place."""
    between = chain[0]
    while between.next is not last:
        between = between.next
        if between in chain:
            continue
        if operation_name(between) in IN_PLACE_OPERATORS or between.kwargs.get("inplace"):
            return False
        if operation_name(between).endswith("_") and not operation_name(between).endswith("__"):
            return False
        if between.op == "call_module" and getattr(attribute(root, str(between.target)), "inplace", False):
            return False
    return True


def _replace(chain: list[fx.Node], new: fx.Node) -> None:
    """`new` in the place of nodes of which each is read by the next one alone."""
    update_record(new, module=record_of(chain[0]).module, spec=record_of(chain[-1]).spec)
    chain[-1].replace_all_uses_with(new)
    for node in reversed(chain):
        node.graph.erase_node(node)


# -- dense layers -----------------------------------------------------------------------------------------


def _fold_dense(root: nn.Module, node: fx.Node, tensors: dict[str, Tensor]) -> None:
    weight, bias = operand(node, 1, "weight"), operand(node, 2, "bias")
    affine = _batch_norm_after(root, node)
    if affine is None or not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return
    if bias is not None and (not isinstance(bias, fx.Node) or bias.op != "get_attr"):
        return
    dense = attribute(root, str(weight.target)).detach()
    added = None if bias is None else attribute(root, str(bias.target)).detach()
    scale = affine.scale.view(-1, *[1] * (dense.dim() - 1))
    tensors[f"{node.name}_weight"] = _scaled(dense, scale)
    tensors[f"{node.name}_bias"] = _shifted(added, affine, dense.dtype)
    last, graph = _only_user(node), node.graph
    with graph.inserting_before(node):
        new_weight = graph.create_node("get_attr", f"{node.name}_weight")
        new_bias = graph.create_node("get_attr", f"{node.name}_bias")
    settings = {name: operand(node, 3 + i, name) for i, name in enumerate(("stride", "padding", "dilation", "groups"))}
    node.args = (operand(node, 0, "input"), new_weight, new_bias)
    node.kwargs = {name: value for name, value in settings.items() if value is not None}
    last.replace_all_uses_with(node)
    graph.erase_node(last)


# -- what follows a layer ---------------------------------------------------------------------------------


def _only_user(node: fx.Node) -> fx.Node:
    return next(iter(node.users))


def _batch_norm_after(root: nn.Module, node: fx.Node) -> _Affine | None:
    """The batch normalisation that alone reads a node, by its running statistics."""
    if len(node.users) != 1:
        return None
    user = _only_user(node)
    if operand(user, 0, "input") is not node:
        return None
    if user.op == "call_module":
        module = attribute(root, str(user.target))
        if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) or _has_hooks(module):
            return None
        return _affine(module.running_mean, module.running_var, module.weight, module.bias, module.eps)
    if user.target is not F.batch_norm or operand(user, 5, "training"):
        return None
    names = ("running_mean", "running_var", "weight", "bias")
    given = [operand(user, 1 + index, name) for index, name in enumerate(names)]
    if not all(item is None or (isinstance(item, fx.Node) and item.op == "get_attr") for item in given):
        return None
    eps = operand(user, 7, "eps")
    read = [None if item is None else attribute(root, str(item.target)) for item in given]
    return _affine(*read, 1e-5 if eps is None else eps)


def _has_hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks))


def _affine(
    mean: Tensor | None, variance: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> _Affine | None:
    if mean is None or variance is None:
        return None
    scale = (variance.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    return _Affine(scale, shift if bias is None else shift + bias.double())


def _scaled(values: Tensor, scale: Tensor) -> Tensor:
    return (values.double() * scale).to(values.dtype)


def _shifted(bias: Tensor | None, affine: _Affine, dtype: torch.dtype) -> Tensor:
    moved = affine.shift if bias is None else affine.shift + bias.double() * affine.scale
    return moved.to(dtype)


def _addition_after(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The sum with another tensor of the same shape that alone reads a node, and that tensor."""
    if len(node.users) != 1:
        return None
    user = _only_user(node)
    if user.target not in _ADDITIONS and not (user.op == "call_method" and user.target in ("add", "add_")):
        return None
    if len(user.args) != 2 or user.kwargs or user.args.count(node) != 1:
        return None
    if operation_name(user) in ("iadd", "add_") and user.args[0] is not node:
        return None  # the other one changes, and somebody may look at it
    other = user.args[1] if user.args[0] is node else user.args[0]
    if not isinstance(other, fx.Node):
        return None
    mine, theirs = record_of(node).spec, record_of(other).spec
    alike = isinstance(mine, TensorSpec) and isinstance(theirs, TensorSpec) and mine.shape == theirs.shape
    return (user, other) if alike and mine.dtype == theirs.dtype else None


def _limits_after(root: nn.Module, node: fx.Node) -> tuple[float | None, float | None] | None:
    """The bounds of the activation that alone reads a node, where bounds are all there is to it."""
    if len(node.users) != 1:
        return None
    user = _only_user(node)
    if user.op == "call_module":
        module: Any = attribute(root, str(user.target))
        if _has_hooks(module):
            return None
        known: Mapping[type, tuple] = {nn.ReLU: (0.0, None), nn.ReLU6: (0.0, 6.0)}
        if type(module) is nn.Hardtanh:
            return module.min_val, module.max_val
        return known.get(type(module))
    torch_function = user.op == "call_method" or getattr(user.target, "__module__", "").startswith("torch")
    if not torch_function and not isinstance(user.target, type(torch.relu)):
        return None
    return _LIMITS.get(operation_name(user))
