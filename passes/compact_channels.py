"""Removes channels from a labelled model: smaller tensors under the same names, and graphs for them."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxsparse.core.channel_labels import narrowed
from fxsparse.core.graphs import attribute
from fxsparse.core.labelled_model import LabelledModel
from fxsparse.core.records import Captured

from .annotate_shapes import annotate_shapes
from .rewrite_channels import Box, CannotRewrite, box_of, cut, rewrite_channels


@dataclass(frozen=True)
class Compacted:
    """A model without some of its channels.

    Attributes:
        captured: the small model, with shapes.
        gone: bool, one a label: what has been removed in the end.
        kept: name of every parameter and buffer that was cut -> per dimension the indices that are left, None where
            all are: what it takes to move an optimizer's state along, or a small tensor back into the large one.
    """

    captured: Captured
    gone: Tensor
    kept: Mapping[str, Box]


def compact_channels(labelled: LabelledModel, gone: Tensor) -> Compacted:
    """A model without these channels; the labelled one stays as it is.

    Args:
        gone: bool, one a label, of atoms that go. What cannot be cut out, since a tensor would be empty or a node
            cannot be rewritten, stays and is masked: the slices that read it become 0.

    Returns:
        The small model, with a note on each node for whose sake channels stay.

    Raises:
        CannotRewrite: a node that cannot be rewritten although it keeps its channels.
    """
    removal = plan_removal(labelled, gone)
    captured = labelled.captured
    model = copy.deepcopy(captured.model)
    _mask_readers(labelled, model, gone & ~removal.gone)
    _cut_tensors(model, removal.kept)
    set_sizes(model, removal.groups, removal.indices)
    small = Captured(
        captured.name,
        model,
        removal.graphs,
        captured.example,
        captured.mechanism,
        [*captured.notes, *removal.notes],
        captured.flags,
        captured.mode_readers,
    )
    annotate_shapes(small)
    return Compacted(small, removal.gone, removal.kept)


@dataclass(frozen=True)
class Removal:
    """What is left of a model without some of its channels, before any tensor is cut.

    Attributes:
        graphs: `"train"` and `"eval"`, for the cut tensors; they have no shapes.
        gone: bool, one a label: what can be cut out.
        kept: as of `Compacted`.
        groups: weight name -> the number of groups of the convolutions with it, where it is another one.
        indices: attribute name -> index of a gather, which the graphs read.
        notes: a sentence on each node for whose sake channels stay.
    """

    graphs: dict[str, fx.Graph]
    gone: Tensor
    kept: Mapping[str, Box]
    groups: Mapping[str, int]
    indices: Mapping[str, Tensor]
    notes: Sequence[str]


def plan_removal(labelled: LabelledModel, gone: Tensor) -> Removal:
    """How the model is to be written without these channels; arguments and errors as of `compact_channels`."""
    notes: list[str] = []
    while True:
        gone = never_empty(labelled, gone)
        try:
            rewritten = {
                mode: rewrite_channels(labelled, mode, gone) for mode, _ in labelled.captured.distinct_graphs()
            }
            break
        except CannotRewrite as refusal:
            left = without_refused(labelled, gone, refusal)
            if torch.equal(left, gone):
                raise
            gone = left
            notes.append(f"channels at node {refusal.node} stay: it cannot be written for fewer")
    graphs = {mode: one.graph for mode, one in rewritten.items()}
    graphs.setdefault("train", graphs["eval"])
    groups = {name: count for one in rewritten.values() for name, count in one.groups.items()}
    indices = {name: index for one in rewritten.values() for name, index in one.indices.items()}
    return Removal(graphs, gone, _boxes(labelled, gone), groups, indices, notes)


def without_refused(labelled: LabelledModel, gone: Tensor, refusal: CannotRewrite) -> Tensor:
    """`gone` without the channels at a node that cannot be rewritten, which are pinned."""
    kept = torch.zeros_like(gone)
    for leaf in _around(labelled, refusal):
        kept[narrowed(leaf).reshape(-1)] = True
        labelled.space.pin(leaf, f"node {refusal.node} cannot be written for fewer channels")
    return gone & ~kept


def _around(labelled: LabelledModel, refusal: CannotRewrite) -> Iterator[Tensor]:
    """The labels of a node that cannot be rewritten, and of what it reads."""
    labels = labelled.nodes[refusal.mode]
    node = next(item for item in labelled.captured.graphs[refusal.mode].nodes if item.name == refusal.node)
    for name in (node.name, *(source.name for source in node.all_input_nodes)):
        yield from _tensors(labels[name])


def never_empty(labelled: LabelledModel, gone: Tensor) -> Tensor:
    """`gone`, less one atom of every tensor that would have nothing left."""
    gone = gone.clone()
    empties = True
    while empties:
        empties = False
        for labels in labelled.nodes.values():
            for leaf in _tensors(list(labels.values())):
                narrow = narrowed(leaf)
                if narrow.numel() and bool(gone[narrow].all()):
                    gone[narrow.min()] = False
                    empties = True
    return gone


# -- tensors ----------------------------------------------------------------------------------------------


@torch.no_grad()
def _mask_readers(labelled: LabelledModel, model: nn.Module, stays: Tensor) -> None:
    for source in labelled.space.blocks:
        if "consumer" in labelled.roles.get((source.name, source.dim), ()):
            unread = stays[labelled.space.labels(source, labelled.space.blocks[source][1])].nonzero().reshape(-1)
            weight = model.get_parameter(source.name)
            weight.index_fill_(source.dim, unread.to(weight.device), 0)


def _boxes(labelled: LabelledModel, gone: Tensor) -> dict[str, Box]:
    """What is kept of every parameter and buffer that loses slices."""
    boxes: dict[str, Box] = {}
    space = labelled.space
    for source, (_, shape) in space.blocks.items():
        if source.kind != "tensor":
            continue
        labels = space.labels(source, shape)
        own = box_of(labels, gone)
        assert own is not None, source
        if source.dim is None:
            box = own
        else:
            box = boxes.get(source.name) or [None] * attribute(labelled.captured.model, source.name).ndim
            box[source.dim] = own[0]
        boxes[source.name] = box
    return {name: box for name, box in boxes.items() if any(kept is not None for kept in box)}


def _cut_tensors(model: nn.Module, boxes: Mapping[str, Box]) -> None:
    """Replaces every parameter and buffer that loses slices, under all its names."""
    replaced: dict[int, Tensor] = {}
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    by_id: dict[int, list[str]] = {}
    for name, tensor in tensors:
        by_id.setdefault(id(tensor), []).append(name)
        replaced.setdefault(id(tensor), tensor)
    for key, names in by_id.items():
        if names[0] not in boxes:
            continue
        old = replaced[key]
        with torch.no_grad():
            data = cut(old.detach(), boxes[names[0]]).clone(memory_format=torch.preserve_format)
        new = nn.Parameter(data, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else data
        for name in names:
            owner, _, attribute_name = name.rpartition(".")
            module = model.get_submodule(owner)
            (module._parameters if isinstance(old, nn.Parameter) else module._buffers)[attribute_name] = new


def set_sizes(model: nn.Module, groups: Mapping[str, int], indices: Mapping[str, Tensor]) -> None:
    """Sets the numbers of channels that modules know of themselves, and the indices of gathers."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    for name, index in indices.items():
        model.register_buffer(name, index.to(device), persistent=False)
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")  # an attribute may compute it, and move statistics
        if not isinstance(weight, Tensor):
            continue
        shape = weight.shape
        if isinstance(module, nn.modules.conv._ConvNd):
            module.groups = groups.get(f"{path}.weight", module.groups)
            first, second = shape[0], shape[1] * module.groups
            is_transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
            module.in_channels, module.out_channels = (first, second) if is_transposed else (second, first)
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = shape
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = shape
        elif isinstance(module, nn.GroupNorm):
            module.num_groups = shape[0] if module.num_groups == module.num_channels else module.num_groups
            module.num_channels = shape[0]
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.normalized_shape = tuple(shape)
        elif hasattr(module, "num_features"):
            module.num_features = shape[0]
        elif isinstance(module, nn.PReLU):
            module.num_parameters = shape[0]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
