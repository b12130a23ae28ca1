"""Runs a shape-annotated graph on channel labels: what is united, what has to stay, and every node's labels.

A `Propagation` is run again and again until no more labels are united, since what one rule sees (do
labels change along this dimension?) depends on unions that others make later. Choices that would lose channels
are left to a last call, with `deciding=True`.

An element depends only on elements of its own label and on elements that are never removed, except through the
weights, whose slices for a removed channel go with it. Every rule keeps to that; whoever cannot, pins.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxsparse.core.arguments import map_leaves
from fxsparse.core.channel_labels import fixed
from fxsparse.core.channel_rules import ChannelRule, channel_rule
from fxsparse.core.graphs import attribute, operation_name
from fxsparse.core.labelled_model import NodeLabels
from fxsparse.core.records import TensorSpec, record_of

from .channel_movement import move_labels
from .channel_operations import OPERATIONS
from .channel_weights import WEIGHTED_OPERATIONS
from .label_run import LabelRun


class Propagation(LabelRun):
    """Gives every node of a graph its labels, by the rule of what it calls."""

    def run(self, graph: fx.Graph) -> NodeLabels:
        for node in graph.nodes:
            self.values[node] = self._visit(node)
        return {node.name: value for node, value in self.values.items()}

    def _visit(self, node: fx.Node) -> Any:
        spec = record_of(node).spec
        if node.op == "get_attr":
            value = attribute(self.root, str(node.target))
            return self.reference(value) if isinstance(value, Tensor) and id(value) in self._names else _as_fixed(spec)
        if node.op == "output":
            self.pin_all(self.operands(node.args), "it is an output of the model")
            return None
        if node.kwargs.get("out") is not None:
            self.pin_all(self.operands((node.args, node.kwargs)), reason_of(node))
        if node.op == "placeholder" or _is_plain(spec):
            if node.op == "call_function" and node.target in (operator.setitem, operator.delitem, setattr):
                self.pin_all(self.operands((node.args, node.kwargs)), reason_of(node))
            if _counts_elements(node):
                for leaf in self.operands(node.args):
                    if isinstance(leaf, Tensor) and leaf.ndim > 1:  # the size of a vector of channels is set by a layer
                        self.pin_where_varying(leaf, range(leaf.ndim), reason_of(node))
            return _as_fixed(spec)
        rule = channel_rule(self.root, node)
        if _picks_from_a_container(node, self.values):
            return self.operands(node.args[0])[node.args[1]]
        try:
            result = RULES[rule.kind](self, node, rule) if rule is not None else None
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):
            result = None  # arguments that the rule is not written for
        if result is None:
            self.pin_all(self.operands((node.args, node.kwargs)), reason_of(node))
            return _as_fixed(spec)
        return result


def _by_movement(run: LabelRun, node: fx.Node, rule: ChannelRule) -> Any:
    return move_labels(run, node)


RULES: dict[str, Callable[[LabelRun, fx.Node, ChannelRule], Any]] = {
    **OPERATIONS,
    **WEIGHTED_OPERATIONS,
    "movement": _by_movement,
}
"""Kind -> function that gives the labels of a node's value, or None where it cannot: then everything is pinned."""


def reason_of(node: fx.Node) -> str:
    place = record_of(node).module
    return f"{operation_name(node)} (node {node.name}{f' in {place}' if place else ''})"


def _as_fixed(spec: Any) -> Any:
    return map_leaves(lambda leaf: fixed(leaf.shape) if isinstance(leaf, TensorSpec) else leaf, spec)


def _is_plain(spec: Any) -> bool:
    """Whether a value holds no tensor: numbers and their like, in containers. Anything else may hide some."""
    return all(isinstance(leaf, _PLAIN) for leaf in pytree.tree_leaves(spec, is_leaf=lambda leaf: leaf is None))


_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, slice, range, type)


def _counts_elements(node: fx.Node) -> bool:
    """A plain value that depends on more than the size of one dimension."""
    if node.op == "call_method":
        return node.target not in ("size", "dim", "is_floating_point", "is_complex", "is_contiguous", "ndimension")
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] not in (
            "shape",
            "dtype",
            "device",
            "ndim",
            "is_cuda",
            "requires_grad",
            "layout",
            "training",
        )
    return node.op == "call_function" and operation_name(node) in ("len", "numel", "iter")


def _picks_from_a_container(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    if operation_name(node) != "getitem" or not isinstance(node.args[0], fx.Node):
        return False
    return isinstance(values[node.args[0]], (tuple, list, dict)) and not isinstance(node.args[1], fx.Node)
