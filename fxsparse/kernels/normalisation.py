"""Batch normalisation with the sum and the ReLU that follow it, as one operator in train mode."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import channels_as_rows, rows_as_channels
from .operators import define

_ops: Any = torch.ops.fxsparse


@define(
    "norm_activation(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool relu) "
    "-> (Tensor, Tensor, Tensor)",
    in_kernels=True,
)
def _forward(x, residual, weight, bias, eps, relu):
    """Where the C++ kernels could not be built."""
    y, mean, rstd = torch.native_batch_norm(channels_as_rows(x), weight, bias, None, None, True, 0.0, eps)
    y = rows_as_channels(y, x)
    y = y if residual is None else y + residual
    return (F.relu(y) if relu else y), mean, rstd


@define(
    "norm_activation_backward(Tensor dy, Tensor x, Tensor y, Tensor? weight, Tensor mean, Tensor rstd, bool relu, "
    "bool has_residual) -> (Tensor, Tensor, Tensor, Tensor)",
    in_kernels=True,
)
def _gradient(dy, x, y, weight, mean, rstd, relu, has_residual):
    dy = dy.masked_fill(y <= 0, 0) if relu else dy.clone()
    dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        *(channels_as_rows(dy), channels_as_rows(x), weight, None, None, mean, rstd, True, 0.0, [True, True, True])
    )
    return rows_as_channels(dx, x), dy if has_residual else dy.new_empty(0), dweight, dbias


@torch.library.register_fake("fxsparse::norm_activation")
def _(x, residual, weight, bias, eps, relu):
    numbers = x.new_empty(x.shape[1])
    return _like(x), numbers, torch.empty_like(numbers)


@torch.library.register_fake("fxsparse::norm_activation_backward")
def _(dy, x, y, weight, mean, rstd, relu, has_residual):
    return _like(x), _like(x) if has_residual else x.new_empty(0), torch.empty_like(mean), torch.empty_like(mean)


def _like(x: Tensor) -> Tensor:
    images, channels, height, width = x.shape
    return x.new_empty((channels, images, height, width)).transpose(0, 1)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, weight, bias, _, ctx.relu = inputs
    y, mean, rstd = output
    ctx.has_residual, ctx.has_bias = residual is not None, bias is not None
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, y, weight, mean, rstd)


def _backward(ctx: Any, dy: Tensor, dmean: Any, drstd: Any) -> tuple:
    x, y, weight, mean, rstd = ctx.saved_tensors
    dx, dresidual, dweight, dbias = _ops.norm_activation_backward(
        dy, x, y, weight, mean, rstd, ctx.relu, ctx.has_residual
    )
    return (
        dx,
        dresidual if ctx.has_residual else None,
        dweight if weight is not None else None,
        dbias if ctx.has_bias else None,
        None,
        None,
    )


torch.library.register_autograd("fxsparse::norm_activation", _backward, setup_context=_setup_context)


def norm_activation(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """`nn.BatchNorm2d`, + residual, ReLU; running statistics are updated in train mode as that module does.

    Args:
        x: (images, channels, height, width), float32 or float64.
        residual: of the shape of `x`, or None.
        weight, bias, running_mean, running_var: (channels) or None.
        batches: the module's `num_batches_tracked`, or None.
        momentum: of the running statistics; None for cumulative averages.
    """
    narrow = x.dtype not in (torch.float32, torch.float64) or (residual is not None and residual.dtype != x.dtype)
    if narrow:  # as under autocast, where layers that stay dense compute in bfloat16
        wide = torch.promote_types(x.dtype, torch.float32)
        x, residual = x.to(wide), None if residual is None else residual.to(wide)
    if not training and running_mean is not None:
        y = rows_as_channels(
            F.batch_norm(channels_as_rows(x), running_mean, running_var, weight, bias, False, 0.0, eps), x
        )
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y
    count = x.numel() // x.shape[1]
    if count <= 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(x.shape)}")
    y, mean, rstd = _ops.norm_activation(x, residual, weight, bias, eps, relu)
    if training and running_mean is not None and running_var is not None:
        with torch.no_grad():
            if batches is not None:
                batches.add_(1)
            factor = 1.0 / float(batches) if momentum is None and batches is not None else momentum or 0.0
            variance = (rstd.detach().pow(-2) - eps) * (count / (count - 1))
            running_mean.lerp_(mean.detach().to(running_mean.dtype), factor)
            running_var.lerp_(variance.to(running_var.dtype), factor)
    return y
