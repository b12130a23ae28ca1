"""The functions that a lowered graph calls in place of `torch.conv2d` and `F.linear`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .no_gradient import without_gradient
from .operators import sparse_conv2d, sparse_conv2d_fused, sparse_linear, sparse_linear_fused
from .update_steps import remember


def lowered_conv(
    x: Tensor,
    values: Tensor,
    pattern: list[Tensor],
    bias: Tensor | None,
    dense_gradient: bool | str,
    run: int,
    key: str,
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    block: int,
) -> Tensor:
    """A convolution over one or two dimensions; arguments as of `sparse_conv2d`.

    On update steps (`dense_gradient`) what the dense gradient is made of is remembered under `run` and `key`.
    """
    x = x.to(values.dtype)  # as under autocast, where layers that stay dense compute in bfloat16
    flat = x.dim() == 3
    if flat:
        x = x.unsqueeze(2)
    y = sparse_conv2d(x, values, pattern, bias, weight, stride, padding, dilation, groups, block)
    y = _remembered(y, x, values, dense_gradient, run, key)
    return y.squeeze(2) if flat else y


def lowered_linear(
    x: Tensor,
    values: Tensor,
    pattern: list[Tensor],
    bias: Tensor | None,
    dense_gradient: bool | str,
    run: int,
    key: str,
    weight: Sequence[int],
    block: int,
) -> Tensor:
    """A linear layer; arguments as of `lowered_conv`."""
    x = x.to(values.dtype)
    y = sparse_linear(x, values, pattern, bias, weight, block)
    return _remembered(y, x, values, dense_gradient, run, key)


def _remembered(y: Tensor, x: Tensor, values: Tensor, dense_gradient: bool | str, run: int, key: str) -> Tensor:
    wanted = dense_gradient and values.requires_grad and torch.is_grad_enabled()
    return remember(y, x, run, key) if wanted else y


def fused_conv(
    x: Tensor,
    values: Tensor,
    pattern: list[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    block: int,
    low: float | None,
    high: float | None,
) -> Tensor:
    """For inference, without gradients: a convolution + bias + residual, limited to [low, high]; over one or two
    dimensions."""
    flat = x.dim() == 3
    if flat:
        x = x.unsqueeze(2)
        residual = None if residual is None else residual.unsqueeze(2)
    settings = (weight, stride, padding, dilation, groups, block)
    y = sparse_conv2d_fused(x, values, pattern, bias, residual, *settings, low, high)
    y = without_gradient(y, x, values, bias, residual)
    return y.squeeze(2) if flat else y


def fused_linear(
    x: Tensor,
    values: Tensor,
    pattern: list[Tensor],
    bias: Tensor | None,
    outputs: int,
    block: int,
    low: float | None,
    high: float | None,
) -> Tensor:
    """For inference, without gradients: a linear layer + bias, limited to [low, high]."""
    y = sparse_linear_fused(x, values, pattern, bias, outputs, block, low, high)
    return without_gradient(y, x, values, bias)
