"""Masks stored as one bit an element: a uint8 tensor with the bits of eight elements in each number.

Elements come in the flat order of the contiguous tensor, the first in the highest bit (as `numpy.packbits` has them).
"""

import numpy as np
import torch
from torch import Tensor

from .host import on_host


def is_packed(stored: Tensor) -> bool:
    """Whether this is a packed mask, and not a bool tensor of the weight's shape."""
    return stored.dtype == torch.uint8


def pack_mask(mask: Tensor) -> Tensor:
    """A mask (bool, any shape) as uint8, (ceil(elements / 8),), on its device."""
    if on_host(mask):
        return torch.from_numpy(np.packbits(mask.reshape(-1).numpy()))
    flat = mask.reshape(-1).to(torch.uint8)
    eights = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (eights << _places(mask)).sum(1, dtype=torch.uint8)


def unpack_mask(stored: Tensor, shape: torch.Size) -> Tensor:
    """From what is stored to a bool tensor of the weight's `shape`; one that is not packed is returned as it is."""
    if not is_packed(stored):
        return stored
    if on_host(stored):
        return torch.from_numpy(np.unpackbits(stored.numpy(), count=shape.numel()).view(np.bool_)).view(shape)
    bits = (stored.unsqueeze(1) >> _places(stored)) & 1
    return bits.view(-1)[: shape.numel()].view(shape).bool()


def _places(tensor: Tensor) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=tensor.device)
