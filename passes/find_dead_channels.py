"""Which channels an unstructured mask has left dead: atoms whose channels no weight reads any more."""

import torch
from torch import Tensor

from fxsparse.core.channel_labels import LabelSource, LabelSpace
from fxsparse.core.labelled_model import LabelledModel


def find_dead_channels(labelled: LabelledModel, gone: Tensor) -> Tensor:
    """`gone`, and every exact atom that is read through zeros only, by what is left.

    Args:
        labelled: the model with labels, which knows the active elements of its weights.
        gone: bool, one a label.

    Returns:
        As `gone`; a channel whose readers are all gone is dead too, and so on.
    """
    space = labelled.space
    gone = gone.clone()
    consumers = [source for source in space.blocks if "consumer" in labelled.roles.get((source.name, source.dim), ())]
    weights = {source: labelled.active_elements(source.name) for source in consumers}
    has_producer = torch.zeros_like(gone)
    for source in space.blocks:
        if "producer" in labelled.roles.get((source.name, source.dim), ()):
            has_producer[_labels(space, source)] = True
    candidates = has_producer & ~space.stays
    while True:
        is_read = torch.zeros_like(gone)
        for source, active in weights.items():
            is_read[_labels(space, source)[_read(labelled, source, active, gone)]] = True
        dead = candidates & ~is_read & ~gone
        if not bool(dead.any()):
            return gone
        gone |= dead


def _labels(space: LabelSpace, source: LabelSource) -> Tensor:
    return space.labels(source, space.blocks[source][1])


def _read(labelled: LabelledModel, source: LabelSource, active: Tensor, gone: Tensor) -> Tensor:
    """Which indices of a weight's consuming dimension have an active element in a row that is left."""
    assert source.dim is not None
    other = LabelSource(source.name, 1 - source.dim)
    active = active.movedim(source.dim, 0).flatten(2) if active.ndim > 2 else active.movedim(source.dim, 0)
    if active.ndim > 2:
        active = active.any(2)
    if other in labelled.space.blocks:
        active = active[:, ~gone[_labels(labelled.space, other)]]
    return active.any(1).cpu()
