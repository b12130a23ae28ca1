"""Zeros wherever a mask is False, whatever stood there: infinities and NaN as well.

The bits of each number, taken as an integer, are multiplied by 0 or 1. On a CPU that takes a quarter to a tenth of the
time of `masked_fill` and `where`, which are not vectorised there, and needs no inverted mask.
"""

import math

import numpy as np
import torch
from torch import Tensor

from .host import on_host

PIECE = 1 << 18
"""Elements that are looked at together."""

FEW_THREADS = 4
"""Up to so many NumPy is faster: torch makes a copy of the mask as integers first, NumPy converts it piece by piece."""

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def zero_outside_(tensor: Tensor, keep: Tensor) -> Tensor:
    """Sets `tensor` to 0 in place where `keep` (bool, the same shape) is False; returns it."""
    if not tensor.is_floating_point() or tensor.element_size() not in _BITS:
        return tensor.masked_fill_(~keep, 0)
    bits = _bits(tensor)
    if on_host(tensor) and torch.get_num_threads() <= FEW_THREADS:
        np.multiply(bits.numpy(), keep.numpy(), out=bits.numpy())
        bits[:0].zero_()  # for the version counter, which NumPy does not know
    else:
        bits.mul_(keep)
    return tensor


def zeroed_outside(tensor: Tensor, keep: Tensor) -> Tensor:
    """A copy of `tensor` with 0 where `keep` (bool, the same shape) is False."""
    if not on_host(tensor) or not tensor.is_floating_point():
        return torch.where(keep, tensor, 0)
    return (_bits(tensor) * keep).view(tensor.dtype)


def norm_within(tensor: Tensor, keep: Tensor) -> Tensor:
    """The 2-norm of `tensor` where `keep` (bool, the same shape) is True: 0-dim, float32, on the device."""
    tensor = tensor.float()
    if not on_host(tensor) or not (tensor.is_contiguous() and keep.is_contiguous()):
        return zeroed_outside(tensor, keep).norm()
    squares = 0.0  # piece by piece: what is made on the way stays in a cache
    for part, own in zip(tensor.view(-1).split(PIECE), keep.view(-1).split(PIECE), strict=True):
        norm = zeroed_outside(part, own).norm().item()
        squares += norm * norm
    return torch.tensor(math.sqrt(squares))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(_BITS[tensor.element_size()])
