"""Zeros wherever a mask is False, whatever stood there: infinities and NaN as well."""

import math

import torch
from torch import Tensor

from .selection import on_host

PIECE = 1 << 18
"""Elements that are looked at together."""

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def zero_outside_(tensor: Tensor, keep: Tensor) -> Tensor:
    """Sets `tensor` to 0 in place where `keep` (bool, the same shape) is False; returns it."""
    if not on_host(tensor) or not tensor.is_floating_point():
        return tensor.masked_fill_(~keep, 0)
    _bits(tensor).bitwise_and_(_all_ones(keep))
    return tensor


def zeroed_outside(tensor: Tensor, keep: Tensor) -> Tensor:
    """A copy of `tensor` with 0 where `keep` (bool, the same shape) is False."""
    if not on_host(tensor) or not tensor.is_floating_point():
        return torch.where(keep, tensor, 0)
    return (_bits(tensor) & _all_ones(keep)).view(tensor.dtype)


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


# On the CPU four times as fast as `masked_fill`, which is not vectorised.
def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.element_size()])


def _all_ones(keep: Tensor) -> Tensor:
    """-1, all bits, where `keep` is True; widened by what it meets."""
    return keep.view(torch.int8).neg()
