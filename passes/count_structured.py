"""Counts what a labelled graph would cost without some of its channels, from its labels: nothing is rewritten.

Every node keeps the share of its cost that its channels which stay are of them all: of a weighted operation the rows
and columns of its weight, of every other the elements of its result, since an operation along channels (a softmax, a
mean) pins or couples them.
"""

from dataclasses import replace
from fractions import Fraction
from math import prod
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxsparse.core.channel_labels import LabelSource, narrowed
from fxsparse.core.graphs import operand
from fxsparse.core.labelled_model import LabelledModel, TensorReference
from fxsparse.core.operations import WEIGHTED

from .count_flops import NodeCost, count_flops


def count_structured(labelled: LabelledModel, mode: str, gone: Tensor, *, training: bool = False) -> list[NodeCost]:
    """The cost of every node of one mode's graph without the channels whose labels are `gone` (bool, one a label).

    Shapes and numbers of elements are those that are left; what is left of a weight counts as active.
    """
    mode = mode if mode in labelled.nodes else "eval"
    graph = labelled.captured.graphs[mode]
    nodes = {node.name: node for node in graph.nodes}
    costs = count_flops(labelled.captured.model, graph, {}, training=training)
    labels = {name: _as_labels(labelled, value) for name, value in labelled.nodes[mode].items()}
    return [_left(labelled, labels, nodes[cost.call or cost.node], cost, gone) for cost in costs]


def _as_labels(labelled: LabelledModel, value: Any) -> Any:
    """A parameter that takes part by its elements has labels like any tensor."""
    if not isinstance(value, TensorReference) or LabelSource(value.name) not in labelled.space.blocks:
        return value
    source = LabelSource(value.name)
    return labelled.space.labels(source, labelled.space.blocks[source][1])


def _left(labelled: LabelledModel, labels: dict[str, Any], node: fx.Node, cost: NodeCost, gone: Tensor) -> NodeCost:
    result = _share(labels[node.name], gone)
    input_shape = _shape_left(labels, next(iter(node.all_input_nodes), node), cost.input_shape, gone)
    output_shape = _shape_left(labels, node, cost.output_shape, gone)
    changes: dict[str, Any] = {}
    share = result
    if cost.weight is not None and cost.weight_shape is not None:
        weight_shape = _weight_left(labelled, cost.weight, cost.weight_shape, gone)
        elements = prod(weight_shape)
        own = tuple(labelled.captured.model.get_parameter(cost.weight).shape)
        size = prod(_weight_left(labelled, cost.weight, own, gone))
        changes = {"weight_shape": weight_shape, "elements": elements, "active": elements, "size": size}
        share = Fraction(elements, cost.elements)
        if node.op == "call_function" and node.target in WEIGHTED and None not in (input_shape, output_shape):
            reuse = WEIGHTED[node.target].reuse
            before = reuse(_known(cost.input_shape), cost.weight_shape, _known(cost.output_shape))
            share *= Fraction(reuse(_known(input_shape), weight_shape, _known(output_shape)), before)
    parameters = cost.parameters
    if cost.weight is not None and cost.elements:
        bias = operand(node, WEIGHTED[node.target].bias, "bias") if node.target in WEIGHTED else None
        rest = parameters - cost.elements
        parameters = changes["elements"] + (int(rest * result) if bias is not None else rest)
    elif parameters:
        parameters = int(parameters * result)
    return replace(
        cost,
        **changes,
        macs=int(cost.macs * share),
        input_shape=input_shape,
        output_shape=output_shape,
        parameters=parameters,
        other={category: _scaled(flops, result) for category, flops in cost.other.items()},
        input_gradient=int(cost.input_gradient * share),
        weight_gradient=int(cost.weight_gradient * share),
    )


def _known(shape: tuple[int, ...] | None) -> tuple[int, ...]:
    assert shape is not None
    return shape


def _share(labels: Any, gone: Tensor) -> Fraction:
    """Fraction of the elements of a value that stay."""
    stays = [~gone[narrowed(leaf)] for leaf in pytree.tree_leaves(labels) if isinstance(leaf, Tensor)]
    total = sum(leaf.numel() for leaf in stays)
    return Fraction(sum(int(leaf.sum()) for leaf in stays), total) if total else Fraction(1)


def _scaled(flops: int, share: Fraction) -> int:
    """What does not divide by the number of channels (the step that BatchNorm counts) is no work on channels."""
    rest = flops % share.denominator
    return int((flops - rest) * share) + rest


def _shape_left(
    labels: dict[str, Any], node: fx.Node, shape: tuple[int, ...] | None, gone: Tensor
) -> tuple[int, ...] | None:
    """The shape of a value without what is gone; as it is where that is no rectangular tensor."""
    leaf = labels[node.name]
    if shape is None or not isinstance(leaf, Tensor) or tuple(leaf.shape) != tuple(shape):
        return shape
    narrow = narrowed(leaf)
    stays = ~gone[narrow]
    left = [
        int(stays.amax([other for other in range(stays.ndim) if other != dim]).sum())
        if stays.ndim > 1
        else int(stays.sum())
        for dim in range(stays.ndim)
    ]
    return tuple(size if narrow.shape[dim] == 1 and size != 1 else left[dim] for dim, size in enumerate(leaf.shape))


def _weight_left(labelled: LabelledModel, name: str, shape: tuple[int, ...], gone: Tensor) -> tuple[int, ...]:
    """What is left of a weight's first two dimensions; of one whose use is transposed too."""
    own = tuple(labelled.captured.model.get_parameter(name).shape)
    left = list(own)
    for dim in range(min(2, len(own))):
        source = LabelSource(name, dim)
        if source in labelled.space.blocks:
            labels = labelled.space.labels(source, labelled.space.blocks[source][1])
            left[dim] = int((~gone[labels]).sum())
    if own == tuple(shape):
        return tuple(left)
    return tuple(reversed(left)) if own == tuple(reversed(shape)) else tuple(shape)


def count_parameters(labelled: LabelledModel, gone: Tensor) -> int:
    """Number of parameters without the channels that are gone, every one counted once."""
    shares: dict[str, Fraction] = {}
    for source, (_, shape) in labelled.space.blocks.items():
        if source.kind == "tensor":
            share = _share(labelled.space.labels(source, shape), gone)
            shares[source.name] = shares.get(source.name, Fraction(1)) * share
    names = labelled.captured.model.named_parameters()
    return sum(int(parameter.numel() * shares.get(name, 1)) for name, parameter in names)
