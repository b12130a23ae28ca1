"""The graph of a submodule as one of the whole model, and its code."""

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.graph_module import _forward_from_src

from ..core.graphs import copy_graph
from ..core.records import META_KEY


def unit_graph(graph: fx.Graph, name: str) -> fx.Graph:
    """A copy whose attributes and modules are named from the model on, not from its submodule `name`.

    Node names get the unit's name in front, so that no two graphs of a model share one. Records go along, and
    fx's own meta does, for the module paths in it.
    """
    head = name.replace(".", "_")
    whole = fx.Graph()
    own: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: own[source])
        target: Any = f"{name}.{node.target}" if node.op in ("get_attr", "call_module") else node.target
        title = node.name if node.op in ("placeholder", "output") else f"{head}__{node.name}"
        own[node] = whole.create_node(node.op, target, args, kwargs, name=title)
        stack = node.meta.get("nn_module_stack")
        inner = next(reversed(stack.values()))[0] if stack else ""
        path = f"{name}.{inner}".rstrip(".")
        own[node].meta["nn_module_stack"] = {path: (path, None)}
        if META_KEY in node.meta:
            own[node].meta[META_KEY] = node.meta[META_KEY]
    return whole


def compile_graph(graph: fx.Graph) -> Callable:
    """The function `(model, *args, **kwargs)` that a graph stands for."""
    code = copy_graph(graph).python_code(root_module="self")
    return _forward_from_src(code.src, code.globals)
