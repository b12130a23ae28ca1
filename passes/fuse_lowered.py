"""For inference: folds batch normalisation into the layer before it, and has a sparse kernel add and limit its result.

A lowered graph's `lowered_conv -> batch_norm -> add -> relu` becomes one call. Layers that stay dense take batch
normalisation into their weights as well.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxsparse.core.graphs import attribute, copy_graph, operand, operation_name
from fxsparse.kernels import SparsePattern
from fxsparse.kernels.calls import fused_conv, fused_linear, lowered_conv, lowered_linear

from .chains import addition_after, has_hooks, may_move, only_user, replace_chain
from .find_lowerable import SparseCall, whole_block

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


@dataclass(frozen=True)
class _Layer:
    """A layer that a sparse kernel runs.

    Attributes:
        x: its input.
        values, starts, columns: its weight.
        bias: or None.
        shape: `(out, in per group, height, width)` of the weight, or `(out, in)` of a linear layer.
        settings: stride, padding, dilation, groups; none of a linear layer.
        block: output channels that share a pattern.
    """

    x: Any
    values: Tensor
    starts: Tensor
    columns: Tensor
    bias: Tensor | None
    shape: tuple[int, ...]
    settings: tuple[Any, ...]
    block: int


@torch.no_grad()
def fuse_lowered(
    root: nn.Module, graph: fx.Graph, whole: Collection[SparseCall] = ()
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """A copy of a lowered graph of eval mode, for inference alone.

    Args:
        root: what the graph's attributes and submodules refer to; not changed.
        graph: annotated with shapes.
        whole: calls without a mask that are to run on a sparse kernel, all of their weights active.

    Returns:
        The graph, and its new tensors by the names under which it reads them.
    """
    fused = copy_graph(graph)
    tensors: dict[str, Tensor] = {}
    own_calls = {call.node: call for call in whole}
    for node in list(fused.nodes):
        if node.target in (lowered_conv, lowered_linear):
            _fuse_sparse(root, node, _lowered_layer(root, node), tensors)
        elif node.name in own_calls:
            _fuse_sparse(root, node, _whole_layer(root, node, own_calls[node.name]), tensors)
        elif node.target in _CONVOLUTIONS:
            _fold_dense(root, node, tensors)
    for node in reversed(list(fused.nodes)):
        if node.op == "get_attr" and not node.users:
            fused.erase_node(node)
    fused.lint()
    return fused, tensors


# -- sparse layers ----------------------------------------------------------------------------------------


def _lowered_layer(root: nn.Module, node: fx.Node) -> _Layer:
    x, weight, pattern, bias, _, _, _, shape, *settings, block = node.args
    starts, columns = (_tensor(root, part) for part in pattern[:2])  # type: ignore[union-attr, index]
    added = None if bias is None else _tensor(root, bias)
    return _Layer(x, _tensor(root, weight), starts, columns, added, tuple(shape), tuple(settings), block)  # type: ignore[arg-type]


def _whole_layer(root: nn.Module, node: fx.Node, call: SparseCall) -> _Layer:
    weight, bias = _tensor(root, operand(node, 1, "weight")), operand(node, 2, "bias")
    block = whole_block(call)
    pattern = SparsePattern.of(torch.ones(weight.shape, dtype=torch.bool), call.groups, block)
    settings = (call.stride, call.padding, call.dilation, call.groups)
    added = None if bias is None else _tensor(root, bias)
    values = pattern.gather(weight)
    return _Layer(
        operand(node, 0, "input"), values, pattern.starts, pattern.columns, added, call.weight, settings, block
    )


def _tensor(root: nn.Module, node: Any) -> Tensor:
    return attribute(root, str(node.target)).detach()


def _fuse_sparse(root: nn.Module, node: fx.Node, layer: _Layer, tensors: dict[str, Tensor]) -> None:
    linear = not layer.settings
    values, added = layer.values, layer.bias
    affine = None if linear else _batch_norm_after(root, node)
    chain, residual = [node], None
    if affine is not None:
        chain.append(only_user(node))
        rows = torch.repeat_interleave(torch.arange(len(layer.starts) - 1), layer.starts.diff().long())
        values = _scaled(values, affine.scale.reshape(-1, layer.block)[rows].flatten())
        added = _shifted(added, affine, values.dtype)
    addition = None if linear else addition_after(chain[-1])
    if addition is not None and may_move(root, chain, addition[0]):
        chain.append(addition[0])
        residual = addition[1]
    low, high = None, None
    limits = _limits_after(root, chain[-1])
    if limits is not None and may_move(root, chain, only_user(chain[-1])):
        chain.append(only_user(chain[-1]))
        low, high = limits
    own = {"values": values.clone(), "starts": layer.starts, "columns": layer.columns}
    if added is not None:
        own["bias"] = added.clone()
    tensors.update({f"{node.name}_{label}": tensor for label, tensor in own.items()})
    graph = node.graph
    with graph.inserting_before(chain[-1]):
        read = {label: graph.create_node("get_attr", f"{node.name}_{label}") for label in own}
        given = (layer.x, read["values"], [read["starts"], read["columns"]], read.get("bias"))
        if linear:
            new = graph.call_function(fused_linear, (*given, layer.shape[0], layer.block, low, high))
        else:
            new = graph.call_function(
                fused_conv, (*given, residual, layer.shape, *layer.settings, layer.block, low, high)
            )
    replace_chain(chain, new)


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
    last, graph = only_user(node), node.graph
    with graph.inserting_before(node):
        new_weight = graph.create_node("get_attr", f"{node.name}_weight")
        new_bias = graph.create_node("get_attr", f"{node.name}_bias")
    settings = {name: operand(node, 3 + i, name) for i, name in enumerate(("stride", "padding", "dilation", "groups"))}
    node.args = (operand(node, 0, "input"), new_weight, new_bias)
    node.kwargs = {name: value for name, value in settings.items() if value is not None}
    last.replace_all_uses_with(node)
    graph.erase_node(last)


# -- what follows a layer ---------------------------------------------------------------------------------


def _batch_norm_after(root: nn.Module, node: fx.Node) -> _Affine | None:
    """The batch normalisation that alone reads a node, by its running statistics."""
    if len(node.users) != 1:
        return None
    user = only_user(node)
    if operand(user, 0, "input") is not node:
        return None
    if user.op == "call_module":
        module = attribute(root, str(user.target))
        if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) or has_hooks(module):
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


def _limits_after(root: nn.Module, node: fx.Node) -> tuple[float | None, float | None] | None:
    """The bounds of the activation that alone reads a node, where bounds are all there is to it."""
    if len(node.users) != 1:
        return None
    user = only_user(node)
    if user.op == "call_module":
        module: Any = attribute(root, str(user.target))
        if has_hooks(module):
            return None
        known: Mapping[type, tuple] = {nn.ReLU: (0.0, None), nn.ReLU6: (0.0, 6.0)}
        if type(module) is nn.Hardtanh:
            return module.min_val, module.max_val
        return known.get(type(module))
    torch_function = user.op == "call_method" or getattr(user.target, "__module__", "").startswith("torch")
    if not torch_function and not isinstance(user.target, type(torch.relu)):
        return None
    return _LIMITS.get(operation_name(user))
