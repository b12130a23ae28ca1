"""From a captured model to its atoms and groups: which channels can only be removed together."""

from collections import defaultdict
from typing import Any

import numpy as np
from torch import Tensor

from fxsparse.core.channel_labels import FIXED, LabelSpace
from fxsparse.core.channel_records import Atom, ChannelGroup, ChannelSlice
from fxsparse.core.labelled_model import LabelledModel, NodeLabels
from fxsparse.core.records import Captured

from .check_rectangles import pin_ragged
from .propagate_channels import Propagation


def label_channels(captured: Captured) -> LabelledModel:
    """Propagates labels through all graphs of a shape-annotated model until nothing changes any more."""
    model = captured.model
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    names: dict[int, str] = {}
    for name, tensor in tensors:
        names.setdefault(id(tensor), name)
    space = LabelSpace()

    def propagate(deciding: bool) -> tuple[dict[str, NodeLabels], Propagation]:
        run = Propagation(model, space, names, deciding)
        return {mode: run.run(graph) for mode, graph in captured.distinct_graphs()}, run

    propagate(deciding=False)
    while space.settle():
        propagate(deciding=False)
    nodes, run = propagate(deciding=True)
    while space.settle():
        nodes, run = propagate(deciding=True)
    for name in {name for name, _ in run.roles} & run.direct:
        for source in [source for source in space.blocks if source.name == name]:
            space.pin(space.labels(source, space.blocks[source][1]), f"{name} is a weight and takes part directly too")
    labelled = LabelledModel(captured, space, nodes, run.roles)
    pin_ragged(labelled)
    return labelled


def group_channels(labelled: LabelledModel) -> list[ChannelGroup]:
    """Atoms with the same producers form a group; in the order in which the labels were made."""
    space = labelled.space
    slices: dict[int, list[ChannelSlice]] = defaultdict(list)
    for source, (_, shape) in space.blocks.items():
        if source.kind == "tensor":
            roles = {"carrier"} if source.dim is None else labelled.roles.get((source.name, source.dim), {"carrier"})
            for label, cuts in _cuts(space.labels(source, shape)).items():
                slices[label] += [
                    ChannelSlice(source.name, dim if source.dim is None else source.dim, indices, role)
                    for role in sorted(roles)
                    for dim, indices in cuts
                ]
    members: dict[tuple[str, ...], list[Atom]] = defaultdict(list)
    for label in sorted(slices):
        own = sorted(slices[label], key=lambda item: item.role != "producer")
        producers = tuple(dict.fromkeys(item.tensor for item in own if item.role == "producer"))
        if producers:
            status, reason = _status(space, label)
            members[producers].append(Atom(label, status, reason, tuple(own)))
    return [ChannelGroup(producers, tuple(atoms)) for producers, atoms in members.items()]


def _status(space: LabelSpace, label: int) -> tuple[Any, str]:
    if label in space.reasons:
        return "pinned", space.reasons[label]
    if label in space.couplings:
        return "norm-coupled", space.couplings[label][0]
    return "exact", ""


def _cuts(labels: Tensor) -> dict[int, list[tuple[int, tuple[int, ...]]]]:
    """Label -> (dimension, indices) along every dimension along which it does not stand everywhere."""
    shape = labels.shape
    flat = labels.reshape(-1).numpy()
    order = np.argsort(flat, kind="stable")
    values, starts = np.unique(flat[order], return_index=True)
    found = {}
    for value, part in zip(values.tolist(), np.split(order, starts[1:]), strict=True):
        if value == FIXED:
            continue
        if len(shape) == 1:
            found[value] = [(0, tuple(part.tolist()))]
            continue
        along = [np.unique(indices) for indices in np.unravel_index(part, shape)]
        found[value] = [(dim, tuple(own.tolist())) for dim, own in enumerate(along) if len(own) < shape[dim]]
    return found
