"""Pooling of activations with channels outermost, for inference: backward is refused."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import channels_contiguous
from .no_gradient import without_gradient
from .operators import define

_ops: Any = torch.ops.fxsparse


@define("max_pool2d(Tensor x, int[2] kernel, int[2] stride, int[2] padding) -> Tensor", in_kernels=True)
def _max_pool2d(x, kernel, stride, padding):
    """Where the C++ kernels could not be built."""
    return channels_contiguous(F.max_pool2d(x, kernel, stride, padding))


@define("plane_mean(Tensor x) -> Tensor", in_kernels=True)
def _plane_mean(x):
    return channels_contiguous(x.mean((2, 3), keepdim=True))


@torch.library.register_fake("fxsparse::max_pool2d")
def _(x, kernel, stride, padding):
    size = [(x.shape[2 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in (0, 1)]
    return x.new_empty((x.shape[1], x.shape[0], *size)).transpose(0, 1)


@torch.library.register_fake("fxsparse::plane_mean")
def _(x):
    return x.new_empty((x.shape[1], x.shape[0], 1, 1)).transpose(0, 1)


def max_pool2d(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """`F.max_pool2d`; gives its result with channels outermost.

    Args:
        x: (images, channels, height, width), float32 or float64, any strides.
        kernel, stride, padding: two numbers each; the padding at most half of the kernel.
    """
    return without_gradient(_ops.max_pool2d(x, kernel, stride, padding), x)


def plane_mean(x: Tensor) -> Tensor:
    """(images, channels, 1, 1): the means over the pixels of x (images, channels, height, width)."""
    return without_gradient(_ops.plane_mean(x), x)
