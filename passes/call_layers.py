"""Writes a graph for torch alone: its layers called as modules, its checks as assertions.

A captured graph calls `F.conv2d(x, weight, bias, ...)`, so that passes see the weight. Where weight and bias are those
of an ordinary layer with the same settings, that is a call of the layer. Nothing of fxsparse is left.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxsparse.core.arguments import check_argument, check_decision
from fxsparse.core.errors import CaptureError
from fxsparse.core.graphs import IN_PLACE_OPERATORS, attribute, copy_graph, operation_name
from fxsparse.core.operations import WEIGHTED
from fxsparse.core.records import TensorSpec, record_of

_SETTINGS = ("stride", "padding", "dilation", "groups")

LAYERS: dict[Callable, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.linear: (nn.Linear, ()),
    torch.conv1d: (nn.Conv1d, _SETTINGS),
    torch.conv2d: (nn.Conv2d, _SETTINGS),
    torch.conv3d: (nn.Conv3d, _SETTINGS),
    **{
        getattr(torch, f"conv_transpose{rank}d"): (
            getattr(nn, f"ConvTranspose{rank}d"),
            ("stride", "padding", "output_padding", "groups", "dilation"),
        )
        for rank in (1, 2, 3)
    },
}
"""Function -> the layer that calls it, and the settings after input, weight and bias, in the function's order."""

_DEFAULTS = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def call_layers(root: nn.Module, graph: fx.Graph) -> fx.Graph:
    """A copy of a graph that needs torch only.

    Args:
        root: what the graph's attributes and submodules refer to.
        graph: annotated with shapes; without masks.

    Raises:
        CaptureError: the node that cannot do without fxsparse, or would not survive fx's own way of saving graphs.
    """
    own = copy_graph(graph)
    for node in list(own.nodes):
        if node.op != "call_function":
            continue
        if _is_number(node):
            _replace_by_its_value(node)
            continue
        if node.target in LAYERS:
            _call_layer(root, node)
        elif node.target is check_decision:
            _assert_decision(node)
        elif node.target is float and isinstance(record_of(node.args[0]).spec, (int, float)):
            node.target, node.args = operator.mul, (node.args[0], 1.0)  # fx does not trace `float`
        elif node.target is check_argument:
            _assert_argument(node)
        elif operation_name(node) in IN_PLACE_OPERATORS:
            _call_method_in_place(node)
        elif node.target is operator.setitem:
            _assign_to_view(node)
        elif node.target in (operator.delitem, setattr):
            raise CaptureError(f"node {node.name} calls {operation_name(node)}, which fx does not save")
        elif (getattr(node.target, "__module__", None) or "").partition(".")[0] == "fxsparse":
            raise CaptureError(f"node {node.name} calls {operation_name(node)} of fxsparse")
    for node in own.find_nodes(op="get_attr"):
        if not node.users:
            own.erase_node(node)
    for node in own.nodes:
        node.meta.clear()
    own.lint()
    return own


def _call_layer(root: nn.Module, node: fx.Node) -> None:
    names = ("input", "weight", "bias", *LAYERS[node.target][1])
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    weight, bias = given.get("weight"), given.get("bias")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return
    if bias is not None and (not isinstance(bias, fx.Node) or bias.op != "get_attr"):
        return
    for source in (weight, bias):  # a tied weight has the name that it got first
        path = str(source.target).rpartition(".")[0] if source is not None else ""
        if path and _is_layer(root, path, node, given):
            node.op, node.target = "call_module", path
            node.args, node.kwargs = (given["input"],), {}
            return


def _is_layer(root: nn.Module, path: str, node: fx.Node, given: dict[str, Any]) -> bool:
    """Whether calling this module is what a node does."""
    assert callable(node.target)
    kind, settings = LAYERS[node.target]
    layer: Any = attribute(root, path)
    bias = attribute(root, str(given["bias"].target)) if given.get("bias") is not None else None
    if (
        type(layer) is not kind
        or any(getattr(layer, hooks) for hooks in _HOOKS)
        or layer.weight is not attribute(root, str(given["weight"].target))
        or layer.bias is not bias
        or getattr(layer, "padding_mode", "zeros") != "zeros"
    ):
        return False
    rank = WEIGHTED[node.target].kernel_rank
    return all(
        _as_tuple(given.get(setting, _DEFAULTS[setting]), rank) == _as_tuple(getattr(layer, setting), rank)
        for setting in settings
    )


def _as_tuple(setting: Any, rank: int) -> Any:
    if isinstance(setting, (tuple, list)) and len(setting) == 1:
        setting = setting[0]
    return (setting,) * rank if isinstance(setting, (int, str)) else tuple(setting)


def _is_number(node: fx.Node) -> bool:
    """Whether a node computes a number from numbers; fx would do so itself when it loads a graph."""
    return not node.all_input_nodes and isinstance(record_of(node).spec, (int, float))


def _replace_by_its_value(node: fx.Node) -> None:
    value = record_of(node).spec
    for user in list(node.users):
        user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda item: value if item is node else item)
    node.graph.erase_node(node)


# -- checks -----------------------------------------------------------------------------------------------


def _assert_equal(node: fx.Node, value: Any, expected: Any, message: str) -> None:
    with node.graph.inserting_before(node):
        equal = node.graph.call_function(operator.eq, (value, expected))
        node.graph.call_function(torch._assert, (equal, message))
    node.graph.erase_node(node)


def _assert_decision(node: fx.Node) -> None:
    value, expected, place = node.args
    if not isinstance(value, fx.Node) and value == expected:
        node.graph.erase_node(node)
        return
    message = f"{place}: this decides what is in the graph"
    if not isinstance(value, fx.Node) or value.target is not len:
        _assert_equal(node, value, expected, message)
        return
    # fx does not trace `len`: nothing may come after as many entries as there were; fewer fail where they are used.
    entries: Any = value.args[0]
    with node.graph.inserting_before(node):
        rest = node.graph.call_function(operator.getitem, (entries, slice(expected, None)))
    _assert_equal(node, rest, type(record_of(entries).spec)(), message)
    for user in list(value.users):
        user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda item: expected if item is value else item)
    value.graph.erase_node(value)


def _assert_argument(node: fx.Node) -> None:
    value, structure, name = node.args
    kind, expected = structure
    if kind == "tensor" and expected is None:
        node.graph.erase_node(node)
        return
    if kind == "tensor":  # what is no tensor fails where it is used
        with node.graph.inserting_before(node):
            rank = node.graph.call_method("dim", (value,))
        _assert_equal(node, rank, expected, f"argument {name}: the graph was captured with {expected} dimensions")
        return
    if kind != "=":
        raise CaptureError(f"argument {name} is a {kind} whose entries are checked, which needs fxsparse")
    _assert_equal(node, value, expected, f"argument {name}: the graph was captured with {expected!r}")


# -- changes in place -------------------------------------------------------------------------------------


def _assign_to_view(node: fx.Node) -> None:
    """`x[:, :4] = y` cannot be traced when fx loads a graph; `x[:, :4].copy_(y)` can."""
    tensor, index, value = node.args
    items = index if isinstance(index, tuple) else (index,)
    plain = [record_of(item).spec if isinstance(item, fx.Node) else item for item in items]
    if not all(item is None or item is Ellipsis or type(item) in (int, slice) for item in plain):
        raise CaptureError(f"node {node.name} assigns to chosen elements of a tensor, which fx does not save")
    is_tensor = isinstance(value, fx.Node) and isinstance(record_of(value).spec, TensorSpec)
    with node.graph.inserting_before(node):
        view = node.graph.call_function(operator.getitem, (tensor, index))
        node.graph.call_method("copy_" if is_tensor else "fill_", (view, value))
    node.graph.erase_node(node)


def _call_method_in_place(node: fx.Node) -> None:
    """`x += y` is traced as a sum of its own when fx loads a graph; `x.add_(y)` stays what it is."""
    name = operation_name(node)[1:]
    if isinstance(record_of(node).spec, TensorSpec):
        method = {"truediv": "div", "mod": "remainder", "and": "bitwise_and", "or": "bitwise_or"}.get(name, name)
        method = {"xor": "bitwise_xor", "floordiv": "floor_divide"}.get(method, method)
        if not hasattr(torch.Tensor, f"{method}_"):
            raise CaptureError(f"node {node.name} changes a tensor by {operation_name(node)}, which fx does not save")
        node.op, node.target = "call_method", f"{method}_"
    else:
        node.target = getattr(operator, name if name not in ("and", "or") else f"{name}_")
