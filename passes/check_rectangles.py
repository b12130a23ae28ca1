"""Pins channels that could not be cut out of some tensor: what is left has to be a rectangular tensor again.

A tensor whose labels change along one dimension can lose any of them. Where they change along several, as between
the two views of a channel shuffle, the tensor itself cannot be cut; if it is only moved on, what comes out in the
end may be gathered straight from what went in (`gather_of`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxsparse.core.channel_labels import LabelSpace, varying_dims
from fxsparse.core.channel_rules import channel_rule
from fxsparse.core.graphs import has_effect
from fxsparse.core.labelled_model import LabelledModel

from .channel_movement import execute, movement_name

COPIES = frozenset(["channel_shuffle", "ChannelShuffle", "roll", "flip", "repeat", "tile", "repeat_interleave"])
"""Movements whose result shares no memory with what they move."""


def pin_ragged(labelled: LabelledModel) -> None:
    """Pins until every tensor can be cut, or gathered from one that can be."""
    while _pin_once(labelled):
        pass


def _pin_once(labelled: LabelledModel) -> bool:
    space, model = labelled.space, labelled.captured.model
    changed = False

    def pin(node: fx.Node, labels: dict[str, Any], reason: str) -> None:
        nonlocal changed
        for leaf in _tensors(labels[node.name]):
            if not bool(space.stays[leaf].all()):
                space.pin(leaf, reason)
                changed = True

    for source in [source for source in space.blocks if source.kind == "tensor" and source.dim is None]:
        labels = space.labels(source, space.blocks[source][1])
        if is_ragged(space, labels):
            space.pin(labels, f"{source.name} has channels along several dimensions")
            changed = True
    for mode, graph in labelled.captured.distinct_graphs():
        labels = labelled.nodes[mode]
        for node in graph.nodes:
            if node.op in ("placeholder", "output", "get_attr") or not _tensors(labels[node.name]):
                continue
            for leaf in _tensors(labels[node.name]):
                if leaf.numel() and not varying_dims(leaf) and not bool(space.stays[leaf.reshape(-1)[0]]):
                    pin(node, labels, f"nothing else is in node {node.name}")
            is_movement = is_moved(model, node)
            ragged = is_ragged(space, labels[node.name])
            if ragged and not is_movement:
                pin(node, labels, f"channels along several dimensions meet in node {node.name}")
            elif ragged and not all(is_moved(model, user) or not _tensors(labels[user.name]) for user in node.users):
                pin(node, labels, f"channels along several dimensions leave the views at node {node.name}")
            elif is_movement and not ragged:
                sources = [source for source in node.all_input_nodes if is_ragged(space, labels[source.name])]
                if sources and gather_of(labelled, mode, node) is None:
                    for source in sources:
                        pin(source, labels, f"node {source.name} reorders channels in a way that is not rewritten")
    return changed


def is_moved(model: Any, node: fx.Node) -> bool:
    rule = channel_rule(model, node)
    return rule is not None and (rule.kind == "movement" or str(node.target) == "contiguous")


def is_ragged(space: LabelSpace, labels: Any) -> bool:
    """Whether a value has channels, some of which may go, along several dimensions of a tensor."""
    return any(len(varying_dims(leaf)) > 1 and not bool(space.stays[leaf].all()) for leaf in _tensors(labels))


def gather_of(labelled: LabelledModel, mode: str, node: fx.Node) -> tuple[fx.Node, int, Tensor] | None:
    """How the value of a movement can be taken from a tensor further up.

    Returns:
        `(source, dim, index)` such that the value is `source.index_select(dim, index)`, in full sizes; None where
        it is not that simple, or where something changes the value in place.
    """
    space, model, labels = labelled.space, labelled.captured.model, labelled.nodes[mode]
    chain: list[fx.Node] = []
    source: Any = node
    while source is node or is_ragged(space, labels[source.name]):
        chain.append(source)
        before = [item for item in source.all_input_nodes if _tensors(labels[item.name])]
        if len(before) != 1 or not is_moved(model, source) or movement_name(model, source) == "pad":
            return None
        source = before[0]
    if not isinstance(labels[source.name], Tensor) or not isinstance(labels[node.name], Tensor):
        return None
    # After an operation that copies, what changes its result does not change what it was made of.
    copies = any(movement_name(model, moved) in COPIES for moved in chain)
    if any(_is_changed(model, moved) for moved in (chain[1:] if copies else chain)):
        return None
    shape = labels[source.name].shape
    values: dict[fx.Node, Any] = {source: torch.arange(shape.numel()).reshape(shape)}
    for moved in reversed(chain):
        values[moved] = execute_node(model, moved, lambda item: values.get(item, labels[item.name]))
    selection = _as_selection(values[node], shape, varying_dims(labels[source.name]))
    return None if selection is None else (source, *selection)


def _as_selection(positions: Tensor, shape: torch.Size, channel_dims: list[int]) -> tuple[int, Tensor] | None:
    if positions.ndim != len(shape) or len(channel_dims) != 1:
        return None
    (dim,) = channel_dims
    coordinates = torch.unravel_index(positions, shape)
    index = coordinates[dim].movedim(dim, 0).reshape(positions.shape[dim], -1)
    if not bool((index == index[:, :1]).all()):
        return None
    expected = torch.arange(shape.numel()).reshape(shape).index_select(dim, index[:, 0])
    return (dim, index[:, 0]) if torch.equal(expected, positions) else None


def execute_node(model: Any, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    if str(node.target) == "contiguous":
        return args[0]
    return execute(model, node, args, kwargs)


def _is_changed(model: Any, node: fx.Node) -> bool:
    """Whether something changes a value in place, itself or through a view."""
    return any(_changes(model, user) or (is_moved(model, user) and _is_changed(model, user)) for user in node.users)


def _changes(model: Any, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    return node.op not in ("placeholder", "output") and has_effect(node)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
