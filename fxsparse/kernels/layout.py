"""Activations with channels outermost, the layout that the kernels read and write.

Such an activation is an ordinary tensor (images, channels, height, width) with other strides. Elementwise operations
keep them. What works channel by channel runs on these views without a copy; on any other layout it is right as well,
with one.
"""

from torch import Tensor


def channels_as_rows(x: Tensor) -> Tensor:
    """(images, channels, height, width) to (1, channels, 1, images * height * width)."""
    return x.transpose(0, 1).reshape(1, x.shape[1], 1, -1)


def rows_as_channels(rows: Tensor, like: Tensor) -> Tensor:
    """Back to the shape of `like`."""
    images, channels, height, width = like.shape
    return rows.reshape(channels, images, height, width).transpose(0, 1)


def channels_outermost(x: Tensor) -> Tensor:
    """(images, channels, height, width) to (channels, images, height, width), and back."""
    return x.transpose(0, 1)
