"""What operators for inference say to a backward pass: autograd would leave gradients out silently."""

from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from .operators import define

_ops: Any = torch.ops.fxsparse


@define("without_gradient(Tensor y, Tensor[] inputs) -> Tensor")
def _without_gradient(y, inputs):
    return y.clone()


@torch.library.register_fake("fxsparse::without_gradient")
def _(y, inputs):
    return y.clone()


def _backward(ctx: Any, dy: Tensor) -> tuple:
    raise InputError(
        "a module that is lowered for inference has no gradients; call it under torch.no_grad(), or train with "
        "sparse.lower(train=True)"
    )


torch.library.register_autograd("fxsparse::without_gradient", _backward)


def without_gradient(y: Tensor, *inputs: Tensor | None) -> Tensor:
    """The result of an operator without gradients: where one of its inputs needs one, backward is an `InputError`.

    Here and not as a formula of each operator, which would cost every call a detour through Python.
    """
    if not torch.is_grad_enabled():
        return y
    wanting = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    return _ops.without_gradient(y, wanting) if wanting else y
