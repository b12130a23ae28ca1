"""Chains of nodes of which each is read by the next one alone: what can become one call."""

import operator

import torch
from torch import fx, nn

from fxsparse.core.graphs import IN_PLACE_OPERATORS, attribute, operation_name
from fxsparse.core.records import TensorSpec, record_of, update_record

_ADDITIONS = (operator.add, torch.add, operator.iadd)


def only_user(node: fx.Node) -> fx.Node:
    """The one node that reads a node that one node reads."""
    return next(iter(node.users))


def addition_after(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The sum with another tensor of the same shape that alone reads a node, and that tensor."""
    if len(node.users) != 1:
        return None
    user = only_user(node)
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


def may_move(root: nn.Module, chain: list[fx.Node], last: fx.Node) -> bool:
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


def replace_chain(chain: list[fx.Node], new: fx.Node) -> None:
    """`new` in the place of nodes of which each is read by the next one alone."""
    update_record(new, module=record_of(chain[0]).module, spec=record_of(chain[-1]).spec)
    chain[-1].replace_all_uses_with(new)
    for node in reversed(chain):
        node.graph.erase_node(node)


def has_hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks))
