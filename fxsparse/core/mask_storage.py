"""A module's masks as they are stored: bool tensors, or their bits, which turn into bool tensors for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .known_zeros import has_zeros, note_zeros
from .packed_masks import is_packed, pack_mask, unpack_mask
from .records import WeightSite


def unpack_masks(module: Any, sites: Sequence[WeightSite]) -> list[tuple[Any, str, str, torch.Tensor]]:
    """Puts bool masks in the place of packed ones: (owner, weight, mask, what was stored) of each."""
    replaced = []
    for site in sites:
        owner, _, weight = site.name.rpartition(".")
        holder, name = module.get_submodule(owner), f"{weight}_mask"
        stored = holder._buffers.get(name)
        if stored is not None and is_packed(stored):
            parameter = getattr(holder, weight)
            holder._buffers[name] = unpack_mask(stored, parameter.shape)
            if has_zeros(parameter, stored):
                note_zeros(parameter, holder._buffers[name])
            replaced.append((holder, weight, name, stored))
    return replaced


@contextmanager
def bool_masks(module: Any, sites: Sequence[WeightSite]) -> Iterator[None]:
    """Packed masks are bool tensors for a while; what they are at its end is stored."""
    replaced = unpack_masks(module, sites)
    try:
        yield
    finally:
        for holder, weight, name, stored in replaced:
            mask = holder._buffers[name]
            bits = pack_mask(mask)
            if not torch.equal(bits, stored):
                stored.copy_(bits)
            if has_zeros(getattr(holder, weight), mask):
                note_zeros(getattr(holder, weight), stored)
            holder._buffers[name] = stored
