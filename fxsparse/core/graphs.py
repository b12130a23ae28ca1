"""Small tools on `fx.Graph`: plain data from a graph and back, operands, parameters."""

import importlib
import operator
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .arguments import check_argument, check_decision
from .input_checks import check_sizes, check_tensor
from .records import META_KEY


@dataclass(frozen=True)
class NodeReference:
    """Stands for a node among packed arguments."""

    name: str


@dataclass(frozen=True)
class OperatorReference:
    """Stands for a `torch.ops` operator, which does not pickle, by its qualified name."""

    name: str


@dataclass(frozen=True)
class FunctionReference:
    """Stands for a function that pickle does not find by its qualified name, such as `F.max_pool2d`."""

    module: str
    name: str


def _function_reference(target: Any) -> Any:
    """A reference to a function that its module holds under its short name; anything else as it is."""
    module, name = getattr(target, "__module__", None), getattr(target, "__name__", None)
    if not callable(target) or "<locals>" not in getattr(target, "__qualname__", "") or not module or not name:
        return target
    found = getattr(sys.modules.get(module), name, None)
    return FunctionReference(module, name) if found is target else target


def pack_graph(graph: fx.Graph) -> list[tuple]:
    """A graph as plain data, `(op, name, target, args, kwargs, record)` a node; pickles and compares."""

    def reference(value: Any) -> Any:
        return NodeReference(value.name) if isinstance(value, fx.Node) else value

    rows = []
    for node in graph.nodes:
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), reference)
        target = node.target
        if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            target = OperatorReference(str(target))
        elif node.op == "call_function":
            target = _function_reference(target)
        rows.append((node.op, node.name, target, args, kwargs, node.meta.get(META_KEY)))
    return rows


def unpack_graph(rows: list[tuple]) -> fx.Graph:
    """The graph that `pack_graph` took apart; node names are kept."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def resolve(value: Any) -> Any:
        return nodes[value.name] if isinstance(value, NodeReference) else value

    for op, name, target, args, kwargs, record in rows:
        if isinstance(target, OperatorReference):
            target = _operator(target.name)
        elif isinstance(target, FunctionReference):
            target = getattr(importlib.import_module(target.module), target.name)
        args, kwargs = fx.node.map_aggregate((args, kwargs), resolve)
        node = graph.create_node(op, target, tuple(args), dict(kwargs), name=name)
        if record is not None:
            node.meta[META_KEY] = record
        nodes[name] = node
    return graph


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same node names and records."""
    return unpack_graph(pack_graph(graph))


def _operator(name: str) -> Any:
    found: Any = torch.ops
    for atom in name.split("."):
        found = getattr(found, atom)
    return found


def operand(node: fx.Node, position: int, keyword: str) -> Any:
    """An argument of a call, wherever it was given."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(keyword)


def attribute(root: nn.Module, target: str) -> Any:
    """The attribute of `root` with the qualified name `target`."""
    value: Any = root
    for atom in target.split("."):
        value = getattr(value, atom)
    return value


def operation_name(node: fx.Node) -> str:
    """The short name of what a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


IN_PLACE_OPERATORS = "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift imatmul".split()
"""Functions of `operator` for `x += y` and its like."""

_EFFECTS = frozenset(
    [
        check_argument,
        check_decision,
        check_sizes,
        check_tensor,
        setattr,
        operator.setitem,
        operator.delitem,
        *(getattr(operator, name) for name in IN_PLACE_OPERATORS),
    ]
)


def has_effect(node: fx.Node) -> bool:
    """Whether running a node does more than compute its result, going by torch's naming conventions."""
    if node.op == "call_function":
        if isinstance(node.target, torch._ops.OpOverload):
            return node.target._schema.is_mutable or node.target in fx.node._side_effectful_functions
        return node.target in _EFFECTS or _ends_in_place(operation_name(node)) or "out" in node.kwargs
    if node.op == "call_method":
        return _ends_in_place(str(node.target))
    return node.op != "get_attr"


def _ends_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


_ARITHMETIC = frozenset(
    getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "getitem")
)


def drop_unused_arithmetic(graph: fx.Graph) -> None:
    """Removes size queries, arithmetic on sizes and attribute reads that nothing uses. Nothing else:
    general dead code elimination would remove normalisation calls and in-place operations that matter."""
    for node in reversed(list(graph.nodes)):
        removable = (
            node.op == "get_attr"
            or (node.op == "call_method" and node.target == "size")
            or (node.op == "call_function" and (node.target is getattr or node.target in _ARITHMETIC))
        )
        if removable and not node.users:
            graph.erase_node(node)
