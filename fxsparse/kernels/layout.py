"""Activations with channels outermost, the layout that the kernels read and write.

Such an activation is an ordinary tensor (images, channels, height, width) with other strides. Elementwise operations
keep them. What works channel by channel runs on these views without a copy; on any other layout it is right as well,
with one.
"""

import torch
from torch import Tensor


def channels_as_rows(x: Tensor) -> Tensor:
    """(images, channels, height, width) to (1, channels, 1, images * height * width)."""
    return x.transpose(0, 1).reshape(1, x.shape[1], 1, -1)


def rows_as_channels(rows: Tensor, like: Tensor) -> Tensor:
    """Back to the shape of `like`."""
    images, channels, height, width = like.shape
    return rows.reshape(channels, images, height, width).transpose(0, 1)


def channels_as_images(x: Tensor) -> Tensor:
    """(images, channels, height, width) to (channels * images, 1, height, width): none where there are no images."""
    return x.transpose(0, 1).flatten(0, 1).unsqueeze(1)


def images_as_channels(planes: Tensor, like: Tensor) -> Tensor:
    """Back to the images and channels of `like`; the planes may have another size."""
    images, channels = like.shape[:2]
    return planes.reshape(channels, images, *planes.shape[2:]).transpose(0, 1)


def pixels_outermost(x: Tensor) -> Tensor:
    """A copy with the channels of a pixel side by side: torch pools maxima many times faster there, copies included."""
    return x.contiguous(memory_format=torch.channels_last)


def channels_contiguous(x: Tensor) -> Tensor:
    """A copy with the channels outermost."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)
