"""The operators: schemas, shapes, gradients. What computes is C++ (`csrc/`), built when it is first needed, or, where
it cannot be built, `torch.sparse` (`fallback.py`).

An operator is called as `torch.ops.fxsparse.sparse_conv2d(...)`, in eager mode, in `torch.compile` graphs and in
exported programs. Activations are what torch calls them, (images, channels, height, width); results are laid out with
channels outermost, which elementwise operations keep, and inputs in that layout need no conversion.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from . import fallback
from .loading import FALLBACK, kernels_in_use

_SETTINGS = "int[] weight, int[2] stride, int[2] padding, int[2] dilation, int groups, int block"

SCHEMAS = (
    f"sparse_conv2d(Tensor x, Tensor values, Tensor[] pattern, Tensor? bias, {_SETTINGS}) -> Tensor",
    f"sparse_conv2d_fused(Tensor x, Tensor values, Tensor[] pattern, Tensor? bias, Tensor? residual, {_SETTINGS}, "
    "float? low, float? high) -> Tensor",
    f"sparse_conv2d_input_gradient(Tensor dy, Tensor x, Tensor values, Tensor[] pattern, {_SETTINGS}) -> Tensor",
    f"sparse_conv2d_weight_gradient(Tensor dy, Tensor x, Tensor[] pattern, {_SETTINGS}) -> Tensor",
    "sparse_linear_fused(Tensor x, Tensor values, Tensor[] pattern, Tensor? bias, int outputs, int block, float? low, "
    "float? high) -> Tensor",
)
"""`values` (count) and `pattern` as of `SparsePattern`; `weight` is the shape of the dense weight.

The fused operators have no gradient: + bias, + residual, limited to [low, high].
"""

_library = torch.library.Library("fxsparse", "DEF")
for _schema in SCHEMAS:
    _library.define(_schema)
_ops: Any = torch.ops.fxsparse


def define(schema: str, *, in_kernels: bool = False) -> Callable[[Callable], Callable]:
    """Makes a Python function an operator of the library.

    Args:
        in_kernels: whether the C++ has it as well, which then goes first and is loaded at the first call.
    """
    name = schema.partition("(")[0]

    def decorated(function: Callable) -> Callable:
        def load_and_call(*args: Any) -> Any:
            return function(*args) if kernels_in_use() == FALLBACK else getattr(_ops, name)(*args)

        _library.define(schema)
        _library.impl(name, load_and_call if in_kernels else function, "CompositeExplicitAutograd")
        return function

    return decorated


def _output_shape(x: Tensor, weight: Sequence[int], stride: Any, padding: Any, dilation: Any) -> tuple[Any, ...]:
    sizes = [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    return x.shape[0], weight[0], *sizes


def _channel_major(like: Tensor, shape: Sequence[Any]) -> Tensor:
    return like.new_empty((shape[1], shape[0], *shape[2:])).transpose(0, 1)


def _refuse_onnx() -> None:
    # Here, since the exporter tries several ways to trace, and only some of them run what calls the operators.
    if torch.onnx.is_in_onnx_export():
        raise InputError("ONNX has no operators for sparse kernels; export sparse.fold(), which is dense")


@torch.library.register_fake("fxsparse::sparse_conv2d", lib=_library)
def _(x, values, pattern, bias, weight, stride, padding, dilation, groups, block):
    _refuse_onnx()
    return _channel_major(x, _output_shape(x, weight, stride, padding, dilation))


@torch.library.register_fake("fxsparse::sparse_conv2d_fused", lib=_library)
def _(x, values, pattern, bias, residual, weight, stride, padding, dilation, groups, block, low, high):
    _refuse_onnx()
    return _channel_major(x, _output_shape(x, weight, stride, padding, dilation))


@torch.library.register_fake("fxsparse::sparse_conv2d_input_gradient", lib=_library)
def _(dy, x, values, pattern, weight, stride, padding, dilation, groups, block):
    return _channel_major(dy, x.shape)


@torch.library.register_fake("fxsparse::sparse_conv2d_weight_gradient", lib=_library)
def _(dy, x, pattern, weight, stride, padding, dilation, groups, block):
    return x.new_empty(pattern[1].shape[0] * block)


@torch.library.register_fake("fxsparse::sparse_linear_fused", lib=_library)
def _(x, values, pattern, bias, outputs, block, low, high):
    _refuse_onnx()
    return x.new_empty((outputs, *x.shape[:-1])).movedim(0, -1)


def _register_loading(name: str) -> None:
    """What an operator does before the C++ is loaded, which then goes first: loads it, or takes the fallback."""

    def load_and_call(*args: Any) -> Tensor:
        for arg in args:
            if isinstance(arg, Tensor) and not (arg.is_cpu and arg.layout == torch.strided):
                kind = f"{arg.layout} on {arg.device}"
                raise ValueError(f"fxsparse::{name} takes dense activations and plain lists on the CPU, got {kind}")
        if kernels_in_use() == FALLBACK:
            return getattr(fallback, name)(*args)
        return getattr(_ops, name)(*args)

    _library.impl(name, load_and_call, "CompositeExplicitAutograd")


for _schema in SCHEMAS:
    _register_loading(_schema.split("(")[0])
    torch.library.register_autocast(f"fxsparse::{_schema.split('(')[0]}", "cpu", torch.float32, lib=_library)


# The three products of a convolution are linear in each of their two operands, and the gradients of each are the other
# two: so there are gradients of gradients of any order.


def _save_convolution(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, pattern, bias, *settings = inputs
    _save(ctx, x, values, pattern, settings)
    ctx.has_bias = bias is not None


def _save_input_gradient(ctx: Any, inputs: tuple, output: Tensor) -> None:
    dy, _, values, pattern, *settings = inputs
    _save(ctx, dy, values, pattern, settings)


def _save_weight_gradient(ctx: Any, inputs: tuple, output: Tensor) -> None:
    dy, x, pattern, *settings = inputs
    _save(ctx, dy, x, pattern, settings)


def _save(ctx: Any, first: Tensor, second: Tensor, pattern: Sequence[Tensor], settings: Sequence[Any]) -> None:
    ctx.save_for_backward(first, second, *pattern)
    ctx.settings = settings


def _convolution_backward(ctx: Any, dy: Tensor) -> tuple:
    x, values, *pattern = ctx.saved_tensors
    dx = dvalues = dbias = None
    if ctx.needs_input_grad[0]:
        dx = _ops.sparse_conv2d_input_gradient(dy, x, values, pattern, *ctx.settings)
    if ctx.needs_input_grad[1]:
        dvalues = _ops.sparse_conv2d_weight_gradient(dy, x, pattern, *ctx.settings)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        dbias = dy.sum((0, 2, 3))
    return dx, dvalues, [None] * len(pattern), dbias, *[None] * len(ctx.settings)


def _input_gradient_backward(ctx: Any, ddx: Tensor) -> tuple:
    dy, values, *pattern = ctx.saved_tensors
    ddy = dvalues = None
    if ctx.needs_input_grad[0]:
        ddy = _ops.sparse_conv2d(ddx, values, pattern, None, *ctx.settings)
    if ctx.needs_input_grad[2]:
        dvalues = _ops.sparse_conv2d_weight_gradient(dy, ddx, pattern, *ctx.settings)
    return ddy, None, dvalues, [None] * len(pattern), *[None] * len(ctx.settings)


def _weight_gradient_backward(ctx: Any, ddvalues: Tensor) -> tuple:
    dy, x, *pattern = ctx.saved_tensors
    ddy = dx = None
    if ctx.needs_input_grad[0]:
        ddy = _ops.sparse_conv2d(x, ddvalues, pattern, None, *ctx.settings)
    if ctx.needs_input_grad[1]:
        dx = _ops.sparse_conv2d_input_gradient(dy, x, ddvalues, pattern, *ctx.settings)
    return ddy, dx, [None] * len(pattern), *[None] * len(ctx.settings)


for _name, _backward, _setup in (
    ("sparse_conv2d", _convolution_backward, _save_convolution),
    ("sparse_conv2d_input_gradient", _input_gradient_backward, _save_input_gradient),
    ("sparse_conv2d_weight_gradient", _weight_gradient_backward, _save_weight_gradient),
):
    torch.library.register_autograd(f"fxsparse::{_name}", _backward, setup_context=_setup, lib=_library)


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    pattern: list[Tensor],
    bias: Tensor | None,
    weight: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    block: int = 1,
) -> Tensor:
    """`F.conv2d` with a weight of which only active positions are stored; differentiable in `x`, `values` and `bias`.

    Args:
        x: (images, channels, height, width), float32 or float64, any strides.
        values: (count), the stored weights in the order of `SparsePattern.indices`; of the dtype of `x`.
        pattern: `SparsePattern.tensors`.
        bias: (out) or None.
        weight: shape of the dense weight.
    """
    return _ops.sparse_conv2d(x, values, pattern, bias, weight, stride, padding, dilation, groups, block)


def sparse_linear(
    x: Tensor, values: Tensor, pattern: list[Tensor], bias: Tensor | None, weight: Sequence[int], block: int = 1
) -> Tensor:
    """`F.linear` with a weight of which only active positions are stored; arguments as of `sparse_conv2d`."""
    outputs, inputs = weight
    pixels = x.reshape(math.prod(x.shape[:-1]), inputs).t()[
        None, :, None
    ]  # one image of one row, a pixel for each vector
    y = _ops.sparse_conv2d(pixels, values, pattern, bias, (outputs, inputs, 1, 1), (1, 1), (0, 0), (1, 1), 1, block)
    return y[0, :, 0].t().reshape(*x.shape[:-1], outputs)


sparse_conv2d_fused = _ops.sparse_conv2d_fused
sparse_linear_fused = _ops.sparse_linear_fused
