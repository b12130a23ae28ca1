"""A captured graph as a plain `torch.fx.GraphModule`: what runs, saves, loads and exports without fxsparse."""

import copy
import inspect
from itertools import zip_longest
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from .core.errors import CaptureError
from .core.graphs import attribute
from .passes.call_layers import call_layers

_OF_MODULES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def plain_module(root: nn.Module, graph: fx.Graph, name: str, *, share: bool = False) -> fx.GraphModule:
    """The graph over a tree of ordinary modules, with all keys of `root` in its order.

    Modules that the graph calls are what they were (convolutions, norms, activations); those that only hold others,
    whose forward is in the graph, become bare `nn.Module`s, so that their classes are not needed either.

    Args:
        root: what the graph's attributes and submodules refer to; not touched.
        graph: annotated with shapes; without masks.
        name: of the class, for printing.
        share: use the modules and tensors of `root` themselves, not copies.

    Raises:
        CaptureError: the node that needs fxsparse, or that fx could not save.
    """
    graph = call_layers(root, graph)
    called = {str(node.target) for node in graph.find_nodes(op="call_module")}
    copies: dict[int, Any] = {}
    tree = _bare(root, "", called, {}, copies, share)
    for node in graph.find_nodes(op="get_attr"):
        owner, _, key = str(node.target).rpartition(".")
        holder: Any = tree.get_submodule(owner)
        if not hasattr(holder, key):
            value = attribute(root, str(node.target))
            setattr(holder, key, value if share else copy.deepcopy(value, copies))
    module = fx.GraphModule(tree, graph, class_name=name)
    for key in _OF_MODULES:  # fx keeps what the graph mentions, in that order
        module.__dict__[key] = tree.__dict__[key]
    module.training = root.training
    _check_saving(module)
    return module


def _bare(
    module: nn.Module, path: str, called: set[str], made: dict[int, nn.Module], copies: dict[int, Any], share: bool
) -> nn.Module:
    if id(module) in made:
        return made[id(module)]
    if path in called:
        made[id(module)] = own = module if share else copy.deepcopy(module, copies)
        return own
    made[id(module)] = own = type(module)() if type(module) in _CONTAINERS else nn.Module()
    own.training = module.training
    for name, parameter in module._parameters.items():
        own.register_parameter(name, parameter if share else copy.deepcopy(parameter, copies))
    for name, buffer in module._buffers.items():
        persistent = name not in module._non_persistent_buffers_set
        own.register_buffer(name, buffer if share else copy.deepcopy(buffer, copies), persistent)
    for name, child in module._modules.items():
        below = f"{path}.{name}" if path else name
        own._modules[name] = None if child is None else _bare(child, below, called, made, copies, share)
    return own


class _CallsOnly(fx.Tracer):
    """As fx traces the code of a graph that it loads."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _check_saving(module: fx.GraphModule) -> None:
    """`CaptureError` unless fx, which saves a graph as code and traces that anew, gives the same graph back."""
    before = [(buffer, buffer._version, buffer.clone()) for buffer in module.buffers()]
    try:
        again = _CallsOnly().trace(module)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise CaptureError(f"fx could not load the graph of {module._get_name()} again: {reason}") from error
    finally:
        for buffer, version, value in before:
            if buffer._version != version:  # tracing carries out what changes a buffer
                with torch.no_grad():
                    buffer.copy_(value)
    pairs = zip_longest(_calls(module.graph), _calls(again))
    differ = next((pair for pair in pairs if pair[0] != pair[1]), None)
    if differ is not None:
        raise CaptureError(f"fx would load another graph of {module._get_name()}: {differ[1]} instead of {differ[0]}")


def _calls(graph: fx.Graph) -> list[tuple]:
    """The calls of a graph in their order; tensors and arguments by name, since fx reads them at other places."""
    place: dict[fx.Node, str] = {}
    calls: list[tuple] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            place[node] = f"{node.op} {node.target}"
        else:
            place[node] = f"%{len(calls)}"
            arguments = repr(fx.map_arg(_bound(node), lambda item: place[item]))
            calls.append((node.op, node.target, arguments))
    return calls


def _bound(node: fx.Node) -> Any:
    """Arguments by name with defaults: a function of Python's tells fx all of them, some by keyword."""
    if isinstance(node.target, FunctionType):
        try:
            bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        except (TypeError, ValueError):
            return node.args, node.kwargs
        bound.apply_defaults()
        return dict(bound.arguments)
    return node.args, node.kwargs
