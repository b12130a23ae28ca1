"""Labels through operations without a weight matrix: elementwise, spatial, normalising and reducing ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxsparse.core.arguments import map_leaves
from fxsparse.core.channel_labels import along, compressed, fixed, varying_dims
from fxsparse.core.channel_rules import ChannelRule, plain_name
from fxsparse.core.graphs import attribute, operand, operation_name
from fxsparse.core.records import TensorSpec, record_of

from .label_run import LabelRun

_DIM_POSITIONS = {"norm": 2, "normalize": 2, "vector_norm": 2, "topk": 2}
"""Reductions whose first argument after the input is no dimension."""

_FIRST_ONLY = frozenset("to type_as type zeros_like ones_like full_like empty_like rand_like randn_like".split())
"""Elementwise operations whose further tensors give a type, not elements."""


def _elementwise(run: LabelRun, node: fx.Node, rule: ChannelRule) -> Any:
    shape = _shape(node)
    operands = _labels_among(run, node)
    if plain_name(operation_name(node)) in _FIRST_ONLY:
        operands = operands[:1]
    if shape is None or not operands or torch.broadcast_shapes(*(labels.shape for labels in operands)) != shape:
        return None
    return unite_elements(run, operands, shape, node.name)


def unite_elements(run: LabelRun, operands: list[Tensor], shape: tuple[int, ...], reason: str) -> Tensor:
    """Unites operands of an elementwise operation.

    An operand that is the same for several channels (a gate of one channel, a scalar) is not united with them:
    it has to stay. So has what meets a tensor that is never cut and has as many channels itself.
    """
    whole = [labels.expand(shape) for labels in operands]
    partners: list[Tensor] = []
    outsiders: list[Tensor] = []
    for index, labels in enumerate(operands):
        if not labels.any():
            outsiders.append(labels)
            continue
        others = [other for position, other in enumerate(whole) if position != index]
        if _is_shared(labels, shape, others):
            outsiders.append(labels)
            if run.deciding:
                run.space.pin(labels, f"{reason} uses it for several channels")
        else:
            partners.append(whole[index])
    if not partners:
        return fixed(shape)
    for labels in partners[1:]:
        run.space.unite(partners[0], labels, reason)
    for labels in outsiders:
        own = [dim - labels.ndim for dim in range(labels.ndim) if labels.shape[dim] > 1]
        run.pin_where_varying(partners[0], own, f"{reason} joins it to a tensor that is not cut")
    return partners[0]


def _is_shared(labels: Tensor, shape: tuple[int, ...], others: list[Tensor]) -> bool:
    """Whether one element meets elements of several channels."""
    broadcast = {
        dim for dim in range(-len(shape), 0) if shape[dim] > 1 and (-dim > labels.ndim or labels.shape[dim] == 1)
    }
    return any(broadcast & {dim - len(shape) for dim in varying_dims(other)} for other in others)


def _spatial(run: LabelRun, node: fx.Node, rule: ChannelRule) -> Any:
    input, *others = _labels_among(run, node)
    for other in others:
        run.space.pin(other, node.name)
    rank = rule.rank or input.ndim - 2
    kept = range(input.ndim - rank)
    leading = run.space.unite_over(input, kept, node.name)

    def labels(spec: TensorSpec) -> Tensor:
        return leading.reshape(*leading.shape, *[1] * rank).expand(spec.shape)

    return map_leaves(lambda leaf: labels(leaf) if isinstance(leaf, TensorSpec) else leaf, record_of(node).spec)


def _glu(run: LabelRun, node: fx.Node, rule: ChannelRule) -> Any:
    (input,) = _labels_among(run, node)
    first, second = input.chunk(2, _dim(run, node, 1, -1))
    run.space.unite(first, second, node.name)
    return first


# -- normalisation ----------------------------------------------------------------------------------------


def _per_channel_norm(run: LabelRun, node: fx.Node, rule: ChannelRule) -> Any:
    """Statistics and parameters, one of each a channel, belong to the channels of dimension 1."""
    input = run.elements(run.operands(operand(node, 0, "input")))
    if not isinstance(input, Tensor) or input.ndim < 2 or _is_unbatched(run, node, input):
        return None
    channels = run.space.unite_over(input, [1], node.name)
    if node.op == "call_module":
        names = ("weight", "bias", "running_mean", "running_var")
        vectors = [run.elements(run.own_tensor(node, name)) for name in names]
    else:
        vectors = _tensors(run.elements(run.operands((node.args[1:], node.kwargs))))
        vectors = [vector for vector in vectors if vector is not input]
    for vector in vectors:
        if vector is not None:
            if vector.numel() != len(channels):
                return None
            run.space.unite(vector.reshape(-1), channels, node.name)
    return along(channels, 1, input.shape)


def _is_unbatched(run: LabelRun, node: fx.Node, input: Tensor) -> bool:
    """An InstanceNorm takes (C, *positions) too; its channels are then in dimension 0."""
    kind = type(attribute(run.root, str(node.target))).__name__ if node.op == "call_module" else ""
    return kind.startswith("InstanceNorm") and input.ndim < int(kind[-2]) + 2


def _prelu(run: LabelRun, node: fx.Node, rule: ChannelRule) -> Any:
    input = run.elements(run.operands(operand(node, 0, "input")))
    slopes = (
        run.elements(run.own_tensor(node, "weight"))
        if node.op == "call_module"
        else run.elements(run.operands(operand(node, 1, "weight")))
    )
    if slopes.numel() == 1:
        return input
    channels = run.space.unite_over(input, [1], node.name)
    run.space.unite(slopes, channels, node.name)
    return along(channels, 1, input.shape)


def _group_norm(run: LabelRun, node: fx.Node, rule: ChannelRule) -> Any:
    if node.op == "call_module":
        module = attribute(run.root, str(node.target))
        (input,), groups = _labels_among(run, node), module.num_groups
        vectors = [run.elements(run.own_tensor(node, name)) for name in ("weight", "bias")]
    else:
        input = run.elements(run.operands(operand(node, 0, "input")))
        groups = run.operands(operand(node, 1, "num_groups"))
        vectors = [run.elements(run.operands(operand(node, at, name))) for at, name in ((2, "weight"), (3, "bias"))]
    channels = run.space.unite_over(input, [1], node.name)
    for vector in vectors:
        if vector is not None:
            run.space.unite(vector, channels, node.name)
    result = along(channels, 1, input.shape)
    if groups == input.shape[1] and node.op != "call_module":
        run.pin_where_varying(result, [1], node.name)  # the number of groups is an argument
    if groups != input.shape[1]:
        run.couple_where_varying(result, [1], node.name)
    return result


def _layer_norm(run: LabelRun, node: fx.Node, rule: ChannelRule) -> Any:
    if node.op == "call_module":
        module = attribute(run.root, str(node.target))
        (input,), normalized = _labels_among(run, node), module.normalized_shape
        vectors = [run.elements(run.own_tensor(node, name)) for name in ("weight", "bias")]
    else:
        input = run.elements(run.operands(operand(node, 0, "input")))
        normalized = run.operands(operand(node, 1, "normalized_shape"))
        vectors = [run.elements(run.operands(operand(node, at, name))) for at, name in ((2, "weight"), (3, "bias"))]
    operands = [input, *(vector for vector in vectors if isinstance(vector, Tensor))]
    result = unite_elements(run, operands, tuple(input.shape), node.name)
    run.couple_where_varying(result, range(-len(tuple(normalized)), 0), node.name)
    return result


# -- along dimensions -------------------------------------------------------------------------------------


def _reduction(run: LabelRun, node: fx.Node, rule: ChannelRule) -> Any:
    input, *others = _labels_among(run, node)
    if others:  # max(x, y)
        return _elementwise(run, node, rule)
    dims = _dim(run, node, _DIM_POSITIONS.get(plain_name(operation_name(node)), 1), None)
    dims = list(range(input.ndim)) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    is_mixed = run.couple_where_varying(input, dims or range(input.ndim), node.name)
    first = input
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    if is_mixed:  # what comes out is no channel of its own
        first = torch.zeros_like(first)

    def labels(spec: TensorSpec) -> Tensor | None:
        if tuple(spec.shape) == tuple(input.shape):
            return input
        if len(spec.shape) == input.ndim:
            return first.expand(spec.shape)
        squeezed = first.reshape([size for dim, size in enumerate(first.shape) if dim - first.ndim not in negative])
        return squeezed.expand(spec.shape)

    negative = {dim % input.ndim - input.ndim for dim in dims} if input.ndim else set()
    try:
        return map_leaves(lambda leaf: labels(leaf) if isinstance(leaf, TensorSpec) else leaf, record_of(node).spec)
    except RuntimeError:
        return None


def _across_channels(run: LabelRun, node: fx.Node, rule: ChannelRule) -> Any:
    (input,) = _labels_among(run, node)
    run.couple_where_varying(input, [1], node.name)
    return input


def _made(run: LabelRun, node: fx.Node, rule: ChannelRule) -> Any:
    return map_leaves(lambda leaf: fixed(leaf.shape) if isinstance(leaf, TensorSpec) else leaf, record_of(node).spec)


OPERATIONS: dict[str, Callable[[LabelRun, fx.Node, ChannelRule], Any]] = {
    "elementwise": _elementwise,
    "spatial": _spatial,
    "glu": _glu,
    "per_channel_norm": _per_channel_norm,
    "prelu": _prelu,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "reduction": _reduction,
    "across_channels": _across_channels,
    "made": _made,
}


# -- arguments --------------------------------------------------------------------------------------------


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    spec = record_of(node).spec
    return spec.shape if isinstance(spec, TensorSpec) else None


def _labels_among(run: LabelRun, node: fx.Node) -> list[Tensor]:
    """The labels of all tensors among a node's arguments, in their order."""
    return [compressed(labels) for labels in _tensors(run.elements(run.operands((node.args, node.kwargs))))]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _dim(run: LabelRun, node: fx.Node, position: int, default: Any) -> Any:
    """The dimensions that a reduction takes, from its arguments or its module."""
    if node.op == "call_module":
        dim = attribute(run.root, str(node.target)).dim
        if dim is None:  # nn.Softmax() without one: 0 or 1 by the number of dimensions
            return 0 if len(_shape(node) or ()) in (0, 1, 3) else 1
        return dim
    given = run.operands(operand(node, position, "dim"))
    if given is None or isinstance(given, bool):
        return default
    return given
