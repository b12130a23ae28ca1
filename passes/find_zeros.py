"""Whether channels are exactly 0 wherever a norm mixes them with others, once every parameter slice of theirs is.

A norm may lose channels only where those are 0, whatever the input is: zeros of its statistics' width then stand for
them. Zeros pass through what maps 0 to 0 (sums, ReLU, dropout, views), begin anew at weights, norms and parameters
whose own slices are 0, and end where anything else is done, or anything unknown.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxsparse.core.channel_labels import LabelSource, narrowed
from fxsparse.core.channel_rules import channel_rule, plain_name
from fxsparse.core.graphs import attribute, has_effect, operand, operation_name
from fxsparse.core.labelled_model import LabelledModel, TensorReference
from fxsparse.core.operations import WEIGHTED
from fxsparse.core.records import record_of

from .channel_movement import movement_name, padding_of
from .check_rectangles import is_moved

NORMS = ("layer_norm", "group_norm")
"""Kinds of coupling operations that can be written for fewer channels."""

_SUMS = frozenset("add sub iadd isub subtract".split())
_PRODUCTS = frozenset("mul imul multiply".split())
_RANDOM = frozenset("dropout alpha_dropout dropout1d dropout2d dropout3d feature_dropout stochastic_depth".split())
_RANDOM_MODULES = frozenset("Dropout Dropout1d Dropout2d Dropout3d StochasticDepth".split())


def nonzero_at_norm(labelled: LabelledModel, mode: str, gone: Tensor) -> str | None:
    """Name of a norm in one mode's graph that is given something else than 0 for these channels; None if none is.

    Args:
        labelled: its parameters are 0 in all slices of the channels.
        gone: bool, one a label.
    """
    return _Zeros(labelled, mode, gone).run()


class _Zeros:
    def __init__(self, labelled: LabelledModel, mode: str, gone: Tensor) -> None:
        self.labelled = labelled
        self.root = self.model = labelled.captured.model
        self.graph: fx.Graph = labelled.captured.graphs[mode]
        self.labels = labelled.nodes.get(mode, labelled.nodes["eval"])
        self.gone = gone
        self.zero: dict[fx.Node, bool] = {}

    def run(self) -> str | None:
        for node in self.graph.nodes:
            rule = channel_rule(self.model, node)
            if rule is not None and rule.kind in NORMS:
                source = operand(node, 0, "input")
                if self._is_touched(self.labels[source.name]) and not self.zero[source]:
                    return node.name
            self.zero[node] = not self._is_touched(self.labels[node.name]) or self._stays_zero(node)
            if not self.zero[node] and self._is_in_place(node):
                return node.name  # what it has changed is read under other names
        return None

    def _is_touched(self, labels: Any) -> bool:
        """Whether a value has elements of the channels; of a parameter, whether they are not 0 there."""
        if isinstance(labels, TensorReference):
            own = self._own_labels(labels)
            return own is not None and bool(labels.tensor.detach().cpu()[self.gone[own]].any())
        leaves = [leaf for leaf in pytree.tree_leaves(labels) if isinstance(leaf, Tensor)]
        return any(bool(self.gone[narrowed(leaf)].any()) for leaf in leaves)

    def _own_labels(self, reference: TensorReference) -> Tensor | None:
        """Of a tensor that takes part by its elements; a weight's slices are its operation's to look at."""
        source, blocks = LabelSource(reference.name), self.labelled.space.blocks
        return self.labelled.space.labels(source, blocks[source][1]) if source in blocks else None

    def is_zero_here(self, source: fx.Node) -> bool:
        """Whether a value has elements of the channels, and those are 0."""
        labels = self.labels[source.name]
        own = self._own_labels(labels) if isinstance(labels, TensorReference) else labels
        return isinstance(own, Tensor) and bool(self.gone[narrowed(own)].any()) and self.zero[source]

    def tensors(self, tree: Any) -> list[fx.Node]:
        """The nodes among arguments whose values are tensors."""
        return [item for item in _nodes(tree) if isinstance(self.labels[item.name], (Tensor, TensorReference))]

    def _is_in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(attribute(self.model, str(node.target)), "inplace", False))
        return node.op.startswith("call") and (has_effect(node) or node.kwargs.get("inplace") is True)

    def all_zero(self, *operands: Any) -> bool:
        return all(self.zero[source] for item in operands for source in _nodes(item))

    # -- operations ---------------------------------------------------------------------------------------

    def _stays_zero(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return False  # only touched if it is not 0
        if operation_name(node) == "getitem" and not isinstance(self.labels[node.args[0].name], Tensor):
            return self.zero[node.args[0]]
        rule = channel_rule(self.model, node)
        if rule is None:
            return False
        if is_moved(self.model, node):
            return self.all_zero(node.args, node.kwargs) and self._pads_zeros(node)
        function = _RULES.get(rule.kind)
        return function is not None and function(self, node)

    def _pads_zeros(self, node: fx.Node) -> bool:
        if movement_name(self.model, node) != "pad":
            return True
        _, mode = padding_of(self, node)
        module = attribute(self.model, str(node.target)) if node.op == "call_module" else None
        value = getattr(module, "value", 0) if module is not None else operand(node, 3, "value")
        return mode != "constant" or not value

    def operands(self, tree: Any) -> Any:
        """Plain arguments as they are for the example."""
        return fx.map_arg(tree, lambda node: record_of(node).spec)

    def has_zero_affine(self, node: fx.Node, **places: int) -> bool:
        """Whether a norm multiplies with a weight of its own, which is 0 in the channels, as its bias is."""
        if node.op == "call_module":
            module: Any = attribute(self.model, str(node.target))
            tensors = [getattr(module, name, None) for name in places]
        else:
            given = [operand(node, place, name) for name, place in places.items()]
            if not all(item is None or (isinstance(item, fx.Node) and item.op == "get_attr") for item in given):
                return False
            tensors = [None if item is None else attribute(self.model, str(item.target)) for item in given]
        return tensors[0] is not None and all(tensor is None or self._is_zero_along(node, tensor) for tensor in tensors)

    def _is_zero_along(self, node: fx.Node, tensor: Tensor) -> bool:
        labels, rule = self.labels[node.name], channel_rule(self.model, node)
        if rule is not None and rule.kind == "layer_norm":  # the last dimensions
            own = labels[(0,) * (labels.ndim - tensor.ndim)]
        else:
            own = labels.movedim(1, 0).flatten(1)[:, 0]
        return not bool(tensor.detach().cpu()[self.gone[own]].any())


def _nodes(tree: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(tree, lambda node: found.append(node) or node)
    return found


def _weighted(run: _Zeros, node: fx.Node) -> bool:
    """The rows of a weight are 0 by assumption; so has the bias to be, which is looked at as what it is."""
    return run.all_zero(operand(node, WEIGHTED[node.target].bias, "bias"))


def _elementwise(run: _Zeros, node: fx.Node) -> bool:
    is_module = node.op == "call_module"
    name = type(attribute(run.model, str(node.target))).__name__ if is_module else plain_name(operation_name(node))
    tensors = run.tensors((node.args, node.kwargs))
    if name in _RANDOM or name in _RANDOM_MODULES or name in ("to", "type", "type_as"):
        return run.zero[tensors[0]]
    if name in _PRODUCTS:
        return any(map(run.is_zero_here, tensors))
    if name in _SUMS:
        return len(tensors) == 2 and all(map(run.is_zero_here, tensors))
    rule = channel_rule(run.model, node)
    if len(tensors) != 1 or rule is None or not rule.constant or not run.zero[tensors[0]]:
        return False
    zeros = torch.zeros(2)  # one operand: it says itself what it makes of 0
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda item: zeros if item is tensors[0] else _number(item))
    with torch.no_grad():
        if is_module:
            result = attribute(run.model, str(node.target))(zeros)
        elif node.op == "call_method":
            result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            result = node.target(*args, **kwargs)
    return isinstance(result, Tensor) and not bool(result.any())


def _number(node: fx.Node) -> Any:
    return record_of(node).spec


def _input(run: _Zeros, node: fx.Node) -> bool:
    return run.all_zero(operand(node, 0, "input"))


def _norm(run: _Zeros, node: fx.Node) -> bool:
    return run.has_zero_affine(node, weight=3, bias=4)


def _layer_norm(run: _Zeros, node: fx.Node) -> bool:
    module = attribute(run.model, str(node.target)) if node.op == "call_module" else None
    name = type(module).__name__ if module is not None else operation_name(node)
    if "rms" not in name.lower():
        return run.has_zero_affine(node, weight=2, bias=3)
    weight = getattr(module, "weight", None) if module is not None else operand(node, 2, "weight")
    return run.has_zero_affine(node, weight=2) if weight is not None else _input(run, node)


def _sum(run: _Zeros, node: fx.Node) -> bool:
    return operation_name(node) in ("sum", "mean") and run.all_zero(operand(node, 0, "input"))


def _contraction(run: _Zeros, node: fx.Node) -> bool:
    sources = run.tensors((node.args, node.kwargs))
    if any(isinstance(run.labels[source.name], TensorReference) for source in sources):
        return True  # a product with a parameter, whose slices are 0
    return any(map(run.is_zero_here, sources))


_RULES: dict[str, Callable[[_Zeros, fx.Node], bool]] = {
    "weighted": _weighted,
    "embedding": lambda run, node: True,
    "elementwise": _elementwise,
    "spatial": _input,
    "prelu": _input,
    "glu": _input,
    "per_channel_norm": _norm,
    "layer_norm": _layer_norm,
    "group_norm": _layer_norm,
    "reduction": _sum,
    "contraction": _contraction,
    "attention": lambda run, node: run.all_zero(operand(node, 2, "value")),
}
