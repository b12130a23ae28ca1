"""What a dense gradient is made of: the input and the output's gradient of every lowered call on an update step.

A lowered weight has no dense gradient. On an update step each of its calls remembers the two activations that one can
be computed from; the runtime computes it weight by weight, and forgets them. Remembering is an operator, so that it
stays in compiled graphs.
"""

import itertools
from collections import defaultdict

import torch
from torch import Tensor

from .operators import define

_numbers = itertools.count(1)
_remembered: dict[int, dict[str, list[tuple[Tensor, Tensor]]]] = defaultdict(lambda: defaultdict(list))


def new_run() -> int:
    """A number under which one module's activations are remembered."""
    return next(_numbers)


def take(run: int, key: str) -> list[tuple[Tensor, Tensor]]:
    """`(input, gradient of the output)` of every call of a weight since the last time; they are forgotten."""
    return _remembered[run].pop(key, []) if run in _remembered else []


def is_remembered(run: int, key: str) -> bool:
    """Whether a call of the weight was remembered."""
    return bool(_remembered.get(run, {}).get(key))


def forget(run: int) -> None:
    """Forgets all of a module's."""
    _remembered.pop(run, None)


@define("remember(Tensor y, Tensor x, int run, str key) -> Tensor")
def _remember(y: Tensor, x: Tensor, run: int, key: str) -> Tensor:
    return y.clone()


@define("remember_gradient(Tensor dy, Tensor x, int run, str key) -> Tensor")
def _remember_gradient(dy: Tensor, x: Tensor, run: int, key: str) -> Tensor:
    _remembered[run][key].append((x.detach(), dy.detach()))
    return dy.clone()  # a result that is used: a compiler would drop the call otherwise


@torch.library.register_fake("fxsparse::remember")
def _(y, x, run, key):
    return torch.empty_like(y)


@torch.library.register_fake("fxsparse::remember_gradient")
def _(dy, x, run, key):
    return torch.empty_like(dy)


def _setup_context(ctx, inputs, output):
    _, x, ctx.run, ctx.key = inputs
    ctx.save_for_backward(x)


def _backward(ctx, dy):
    (x,) = ctx.saved_tensors
    return torch.ops.fxsparse.remember_gradient(dy, x, ctx.run, ctx.key), None, None, None


torch.library.register_autograd("fxsparse::remember", _backward, setup_context=_setup_context)


def remember(y: Tensor, x: Tensor, run: int, key: str) -> Tensor:
    """`y`; its gradient is remembered with `x` on the way back."""
    return torch.ops.fxsparse.remember(y, x, run, key)
