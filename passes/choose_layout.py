"""Runs what works channel by channel on activations with channels outermost, the layout of the sparse kernels.

Lowered convolutions give that layout and elementwise operations keep it. Batch normalisation and pooling would copy
such an activation; on a view that says where its channels lie, they do not.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxsparse.core.graphs import attribute, operand, operation_name
from fxsparse.core.records import TensorSpec, record_of, update_record
from fxsparse.kernels.calls import fused_conv, lowered_conv
from fxsparse.kernels.layout import (
    channels_as_images,
    channels_as_rows,
    channels_contiguous,
    images_as_channels,
    pixels_outermost,
    rows_as_channels,
)
from fxsparse.kernels.normalisation import norm_activation
from fxsparse.kernels.pooling import max_pool2d, plane_mean

from .chains import has_hooks

_SPARSE = (lowered_conv, fused_conv, norm_activation, max_pool2d, plane_mean)
_DTYPES = (torch.float32, torch.float64)
_PLANEWISE = frozenset("avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d lp_pool2d".split())
_ELEMENTWISE = frozenset(
    "relu relu6 relu_ relu6_ hardtanh hardtanh_ hardswish hardswish_ hardsigmoid silu silu_ gelu elu selu sigmoid tanh "
    "leaky_relu leaky_relu_ softplus mish clamp clamp_ add add_ iadd sub mul mul_ imul div truediv dropout neg".split()
)
_POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.SiLU,
    nn.GELU,
    nn.ELU,
    nn.SELU,
    nn.Sigmoid,
    nn.Tanh,
    nn.LeakyReLU,
    nn.Softplus,
    nn.Mish,
    nn.Dropout,
    nn.Identity,
)


def find_outermost(root: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """The activations of a lowered graph that have, or can have, their channels outermost.

    Args:
        root: what the graph's submodules refer to.
        graph: annotated with shapes.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target in _SPARSE:
            spec = record_of(node).spec
            keeps = isinstance(spec, TensorSpec) and len(spec.shape) == 4
        elif any(source in found for source in node.all_input_nodes):
            keeps = _is(root, node, _ELEMENTWISE, _ACTIVATIONS) and _same_shape(node)
            by_channel = is_batch_norm(root, node) or _is_max_pool(root, node) or _is(root, node, _PLANEWISE, _POOLS)
            one = isinstance(record_of(node).spec, TensorSpec)  # not with the indices of maxima
            keeps = keeps or (one and by_channel and operand(node, 0, "input") in found)
        else:
            keeps = False
        if keeps:
            found.add(node)
    return found


def pool_on_kernels(root: nn.Module, graph: fx.Graph) -> int:
    """Has pooling done by the kernels, in place, where they know how; for inference.

    Maxima that they do not know are taken with the channels of a pixel side by side: torch is many times faster there,
    copies included.

    Returns:
        Number of pooling operations.
    """
    count = 0
    for node in list(graph.nodes):
        spec = record_of(operand(node, 0, "input")).spec if isinstance(operand(node, 0, "input"), fx.Node) else None
        if not isinstance(spec, TensorSpec) or len(spec.shape) != 4 or spec.dtype not in _DTYPES:
            continue
        if node.op == "call_module" and has_hooks(attribute(root, str(node.target))):
            continue
        if _is_max_pool(root, node):
            windows = _windows(root, node)
            if windows is None:
                _on_view(node, pixels_outermost, channels_contiguous)
            else:
                _replace(node, max_pool2d, *windows)
        elif _is_mean(root, node):
            _replace(node, plane_mean)
        else:
            continue
        count += 1
    return count


def _windows(root: nn.Module, node: fx.Node) -> tuple[Any, Any, Any] | None:
    """Kernel, stride and padding of a maximum over windows, two numbers each; None where no kernel knows it."""
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    if node.op == "call_module":
        module: Any = attribute(root, str(node.target))
        given = [getattr(module, name) for name in names]
    else:
        given = [operand(node, 1 + index, name) for index, name in enumerate(names)]
    kernel, stride, padding, dilation, *flags = given
    pairs = [_pair_of(part) for part in (kernel, stride or kernel, padding or 0, 1 if dilation is None else dilation)]
    if any(flags) or None in pairs or pairs[3] != (1, 1):
        return None
    return pairs[0], pairs[1], pairs[2]


def _is_mean(root: nn.Module, node: fx.Node) -> bool:
    if not _is(root, node, frozenset(["adaptive_avg_pool2d"]), (nn.AdaptiveAvgPool2d,)):
        return False
    size = (
        attribute(root, str(node.target)).output_size if node.op == "call_module" else operand(node, 1, "output_size")
    )
    return _pair_of(size) == (1, 1)


def _pair_of(value: Any) -> tuple[int, int] | None:
    given = (value, value) if isinstance(value, int) else value
    whole = isinstance(given, (tuple, list)) and all(type(part) is int for part in given)
    return (given[0], given[-1]) if whole and len(given) in (1, 2) else None


def _replace(node: fx.Node, function: Callable, *args: Any) -> None:
    with node.graph.inserting_before(node):
        new = node.graph.call_function(function, (operand(node, 0, "input"), *args))
    update_record(new, spec=record_of(node).spec, module=record_of(node).module)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def choose_layout(root: nn.Module, graph: fx.Graph) -> int:
    """Rewrites a lowered graph, which is annotated with shapes, in place.

    Returns:
        Number of operations that run on views now.
    """
    outermost = find_outermost(root, graph)
    changed = 0
    for node in list(graph.nodes):
        if node not in outermost or operand(node, 0, "input") not in outermost:
            continue
        if is_batch_norm(root, node):
            outermost.add(_on_view(node, channels_as_rows, rows_as_channels, operand(node, 0, "input")))
        elif _is(root, node, _PLANEWISE, _POOLS):
            outermost.add(_on_view(node, channels_as_images, images_as_channels, operand(node, 0, "input")))
        else:
            continue
        changed += 1
    return changed


def _is(root: nn.Module, node: fx.Node, names: frozenset[str], modules: tuple[type, ...]) -> bool:
    if node.op == "call_module":
        return type(attribute(root, str(node.target))) in modules
    plain = node.op == "call_method" or node.target in _known(names)
    return plain and operation_name(node) in names


def _known(names: frozenset[str]) -> set[Callable]:
    places = (torch, F, operator, torch._C._nn)
    return {getattr(place, name) for place in places for name in names if hasattr(place, name)}


def is_batch_norm(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node normalises images over a batch; a module with hooks is left alone."""
    if node.op == "call_module":
        module = attribute(root, str(node.target))
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        return type(module) is nn.BatchNorm2d and not any(hooks)
    return node.target is F.batch_norm


def _is_max_pool(root: nn.Module, node: fx.Node) -> bool:
    return _is(root, node, frozenset(["max_pool2d"]), (nn.MaxPool2d,))


def _same_shape(node: fx.Node) -> bool:
    """Whether all tensors are activations of one shape, or numbers."""
    specs = [record_of(item).spec for item in (node, *node.all_input_nodes)]
    shapes = {spec.shape for spec in specs if isinstance(spec, TensorSpec)}
    return len(shapes) == 1


def _on_view(node: fx.Node, there: Callable, back: Callable, *like: fx.Node) -> fx.Node:
    """Has a node read `there(input)`, and its users `back(result, *like)`."""
    source = operand(node, 0, "input")
    graph = node.graph
    with graph.inserting_before(node):
        view = graph.call_function(there, (source,))
    node.replace_input_with(source, view)
    with graph.inserting_after(node):
        result = graph.call_function(back, (node, *like))
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
    for new in (view, result):
        update_record(new, module=record_of(node).module)
    update_record(result, spec=record_of(node).spec)
    return result
