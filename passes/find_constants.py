"""Which channels are constant whatever the input is: what a filter without an active input leaves.

`find_constants` runs a labelled graph on values that are numbers where they are known and NaN where they are not.
Whatever is not listed here is not known.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxsparse.core.channel_labels import narrowed
from fxsparse.core.channel_rules import ChannelRule, channel_rule, plain_name
from fxsparse.core.graphs import attribute, has_effect, operand, operation_name
from fxsparse.core.labelled_model import LabelledModel, TensorReference
from fxsparse.core.operations import WEIGHTED
from fxsparse.core.records import TensorSpec, record_of

from .channel_movement import execute
from .check_rectangles import is_moved

Constants = dict[str, Any]
"""Node name -> a value of the node's structure, float64, NaN where it is not constant; None where nothing is."""


def find_constants(labelled: LabelledModel, mode: str) -> Constants:
    """The constants of one mode, for the active weights as they are stored."""
    return _Constants(labelled, mode).run()


class _Constants:
    def __init__(self, labelled: LabelledModel, mode: str) -> None:
        self.model = labelled.captured.model
        self.graph: fx.Graph = labelled.captured.graphs[mode]
        self.labels = labelled.nodes.get(mode, labelled.nodes["eval"])
        self.active = labelled.active_elements
        self.training = mode == "train"
        self.flags: dict[str, bool] = labelled.captured.flags.get(mode, {})
        self.values: Constants = {}

    def run(self) -> Constants:
        for node in self.graph.nodes:
            value = self._value(node) if node.op.startswith("call") else None
            self.values[node.name] = value
            if node.op.startswith("call") and self._is_in_place(node):
                self._overwrite(node, value)
        return self.values

    def _value(self, node: fx.Node) -> Any:
        spec = record_of(node).spec
        rule = channel_rule(self.model, node)
        if operation_name(node) == "getitem" and not isinstance(self.labels[node.args[0].name], Tensor):
            container = self.values[node.args[0].name]
            return None if container is None else container[node.args[1]]
        if rule is None or not _has_labels(self.labels[node.name]):
            return None
        if rule.kind != "weighted" and not any(map(self._is_known, node.all_input_nodes)):
            return None
        if is_moved(self.model, node):
            return self._moved(node)
        function = _RULES.get(rule.kind)
        if function is None or not isinstance(spec, TensorSpec):
            return None
        value = function(self, node, rule)
        return None if value is None or bool(value.isnan().all()) else _compressed(value.expand(spec.shape))

    def _is_known(self, source: fx.Node) -> bool:
        return self.values.get(source.name) is not None

    def operand_of(self, source: Any) -> Any:
        """The value of an argument: known or not, of a parameter what it holds; numbers that are computed are not."""
        if not isinstance(source, fx.Node):
            return source
        labels = self.labels[source.name]
        if isinstance(labels, TensorReference) and labels.tensor.is_floating_point():
            return labels.tensor.detach().double().cpu()
        value = self.values[source.name]
        if isinstance(value, Tensor):
            return narrowed(value)
        return torch.tensor(torch.nan, dtype=torch.float64)

    def _moved(self, node: fx.Node) -> Any:
        if any(isinstance(self.labels[source.name], TensorReference) for source in node.all_input_nodes):
            return None

        def value_of(source: fx.Node) -> Any:
            if not _has_labels(self.labels[source.name]):
                return record_of(source).spec
            value = self.values[source.name]
            unknown = pytree.tree_map(lambda leaf: _unknown(leaf.shape), self.labels[source.name])
            if value is None:
                return unknown
            pairs = zip(pytree.tree_leaves(value), pytree.tree_leaves(unknown), strict=True)
            leaves = [one if isinstance(one, Tensor) else other for one, other in pairs]
            return pytree.tree_unflatten(leaves, pytree.tree_structure(unknown))

        if str(node.target) == "contiguous":
            return self.values[node.args[0].name]
        args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
        try:
            moved = execute(self.model, node, args, kwargs)
        except RuntimeError:
            return None
        return pytree.tree_map(lambda leaf: _compressed(leaf) if isinstance(leaf, Tensor) else leaf, moved)

    # -- changes in place ---------------------------------------------------------------------------------

    def _is_in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(attribute(self.model, str(node.target)), "inplace", False))
        return has_effect(node) or node.kwargs.get("inplace") is True

    def _overwrite(self, node: fx.Node, value: Any) -> None:
        """What is changed has the new value from here on; its views are not known any more."""
        for source in node.all_input_nodes:
            if not _has_labels(self.labels[source.name]):
                continue
            self.values[source.name] = value if source is (node.args[0] if node.args else None) else None
            open_nodes, seen = [source], {source, node}
            while open_nodes:
                current = open_nodes.pop()
                around = [*current.users] + (current.all_input_nodes if self._is_view(current) else [])
                for other in around:
                    linked = self._is_view(other) or other in current.all_input_nodes
                    if linked and other not in seen:
                        seen.add(other)
                        open_nodes.append(other)
                        self.values[other.name] = None

    def _is_view(self, node: fx.Node) -> bool:
        return node.op.startswith("call") and (is_moved(self.model, node) or self._is_in_place(node))


# -- operations -------------------------------------------------------------------------------------------


def _weighted(run: _Constants, node: fx.Node, rule: ChannelRule) -> Tensor | None:
    """A row is constant where every channel that it has an active weight for is, and no padding is among them."""
    operation = WEIGHTED[node.target]
    weight, bias = (
        run.labels[source.name] if isinstance(source, fx.Node) else None
        for source in (operand(node, operation.weight, "weight"), operand(node, operation.bias, "bias"))
    )
    if not isinstance(weight, TensorReference) or weight.tensor.is_meta:
        return None
    shape = record_of(node).spec.shape
    channel = len(shape) - operation.kernel_rank - 1
    matrix, active = weight.tensor.detach().double().cpu(), run.active(weight.name).cpu()
    groups = (operand(node, 6, "groups") or 1) if operation.kernel_rank else 1
    if "transpose" in operation.name:
        is_empty = ~active.transpose(0, 1).flatten(1).any(1).repeat(groups)
        rows = torch.where(is_empty, 0.0, torch.nan)
    else:
        inputs = channel_values(run.values, operand(node, 0, "input"), channel)
        rows = _rows(matrix, active, inputs, groups, is_padded(node))
    if isinstance(bias, TensorReference):
        rows = rows + bias.tensor.detach().double().cpu()
    elif operand(node, operation.bias, "bias") is not None:
        return None
    view = [1] * len(shape)
    view[channel] = -1
    return rows.view(view)


def _rows(matrix: Tensor, active: Tensor, inputs: Tensor | None, groups: int, padded: bool) -> Tensor:
    """Constant sums of rows, without bias; NaN where they are not."""
    sums = matrix.flatten(2).sum(2) if matrix.ndim > 2 else matrix
    active = active.flatten(2).any(2) if active.ndim > 2 else active
    if inputs is None or (groups > 1 and sums.shape[1] > 1):
        return torch.where(active.any(1), torch.nan, 0.0).double()
    own = inputs.repeat_interleave(sums.shape[0] // groups)[:, None] if groups > 1 else inputs.expand(sums.shape)
    terms = torch.where(active, sums * own, 0.0)
    if padded:
        terms = torch.where(active & (own != 0), torch.nan, terms)
    return terms.sum(1)


def is_padded(node: fx.Node) -> bool:
    """Whether a convolution surrounds its input with zeros."""
    padding = operand(node, 4, "padding")
    if padding is None or WEIGHTED[node.target].kernel_rank == 0:
        return False
    return any(padding) if isinstance(padding, (tuple, list)) else padding not in (0, "valid")


def channel_values(values: Constants, source: Any, channel: int) -> Tensor | None:
    """One constant a channel, NaN where a channel has none or several; None where nothing is known."""
    value = values.get(source.name) if isinstance(source, fx.Node) else None
    if not isinstance(value, Tensor):
        return None
    flat = narrowed(value).movedim(channel, 0).flatten(1)
    same = (flat == flat[:, :1]).all(1)
    return torch.where(same, flat[:, 0], torch.nan).expand(value.shape[channel])


def _elementwise(run: _Constants, node: fx.Node, rule: ChannelRule) -> Tensor | None:
    name = plain_name(operation_name(node)) if node.op != "call_module" else type(_module(run, node)).__name__
    args, kwargs = fx.map_arg((node.args, node.kwargs), run.operand_of)
    if name.lower().replace("_", "") in ("dropout", "dropout1d", "dropout2d", "dropout3d", "stochasticdepth"):
        return torch.where(args[0] == 0, args[0], torch.nan)
    if not rule.constant or kwargs.get("out") is not None:
        return None
    if name in ("to", "type", "type_as", "float", "double", "half", "bfloat16"):
        return args[0]
    shape = torch.broadcast_shapes(*(item.shape for item in (*args, *kwargs.values()) if isinstance(item, Tensor)))
    with torch.no_grad():
        if node.op == "call_module":
            return _module(run, node)(args[0].clone())
        # What is not known is a single NaN, which an operation in place could not widen.
        first = args[0].expand(shape).clone() if isinstance(args[0], Tensor) else args[0]
        if node.op == "call_method":
            result = getattr(first, str(node.target))(*args[1:], **kwargs)
        else:
            result = node.target(first, *args[1:], **kwargs)
    if name in ("mul", "imul", "multiply"):
        for factor in args[:2]:
            if isinstance(factor, Tensor):
                result = torch.where(factor == 0, 0.0, result)
    return result


def _spatial(run: _Constants, node: fx.Node, rule: ChannelRule) -> Tensor | None:
    """Pooling of what is the same at all positions; averages with zeros around only of zeros."""
    name = (operation_name(node) if node.op != "call_module" else type(_module(run, node)).__name__).lower()
    source = node.args[0] if node.args else node.kwargs.get("input")
    value = run.values.get(source.name)
    if not isinstance(value, Tensor) or "lp" in name or "grid" in name:
        return None
    rank = rule.rank or value.ndim - 2
    value = narrowed(value)
    if any(size != 1 for size in value.shape[value.ndim - rank :]):
        return None
    averages = "avg" in name and "adaptive" not in name
    return torch.where(value == 0, value, torch.nan) if averages else value


def _per_channel_norm(run: _Constants, node: fx.Node, rule: ChannelRule) -> Tensor | None:
    """A constant channel is its shift after batch statistics, and what the running statistics make of it else."""
    if node.op != "call_module" or not isinstance(node.args[0], fx.Node):
        return None
    module: Any = _module(run, node)
    value = channel_values(run.values, node.args[0], 1)
    if value is None:
        return None

    def vector(name: str, default: float) -> Tensor:
        own = getattr(module, name, None)
        return torch.full_like(value, default) if own is None else own.detach().double().cpu()

    shift = vector("bias", 0.0)
    has_running = getattr(module, "running_mean", None) is not None
    training = run.flags.get(str(node.target), run.training)
    if has_running and (not training or type(module).__name__ == "FrozenBatchNorm2d"):
        scale = vector("weight", 1.0) / (vector("running_var", 1.0) + module.eps).sqrt()
        result = (value - vector("running_mean", 0.0)) * scale + shift
    else:
        result = torch.where(value.isnan(), torch.nan, shift)
    ndim = len(record_of(node).spec.shape)
    return result.view(1, -1, *[1] * (ndim - 2))


def _mean(run: _Constants, node: fx.Node, rule: ChannelRule) -> Tensor | None:
    if operation_name(node) != "mean" or not isinstance(node.args[0], fx.Node):
        return None
    value = run.values[node.args[0].name]
    return value.mean(*node.args[1:], **node.kwargs) if isinstance(value, Tensor) else None


_RULES: dict[str, Callable[[_Constants, fx.Node, ChannelRule], Tensor | None]] = {
    "weighted": _weighted,
    "elementwise": _elementwise,
    "spatial": _spatial,
    "per_channel_norm": _per_channel_norm,
    "reduction": _mean,
}


def _module(run: _Constants, node: fx.Node) -> Any:
    return attribute(run.model, str(node.target))


def _has_labels(tree: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(tree))


def _unknown(shape: torch.Size) -> Tensor:
    return torch.tensor(torch.nan, dtype=torch.float64).expand(shape)


def _compressed(value: Tensor) -> Tensor:
    """Expanded along every dimension along which it does not change."""
    shape = value.shape
    narrow = narrowed(value)
    for dim in range(narrow.ndim):
        first = narrow.narrow(dim, 0, 1)
        if narrow.shape[dim] > 1 and bool(((narrow == first) | (narrow.isnan() & first.isnan())).all()):
            narrow = first
    return narrow.expand(shape)
