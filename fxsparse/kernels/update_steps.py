"""What a dense gradient is made of: the input and the output's gradient of every lowered call on an update step.

A lowered weight has no dense gradient. On an update step each of its calls remembers the two activations that one can
be computed from, in the weight's `Window`; the runtime computes it weight by weight, and forgets them. Remembering is
an operator, so that it stays in compiled graphs.

A window is what `weight.grad` of a masked weight would have taken up: it begins anew where the user's loop has cleared
the gradient since the last backward pass (`zero_grad`), which the values' gradient tells.
"""

import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import RuntimeStateError
from .operators import define

_numbers = itertools.count(1)
_windows: "weakref.WeakValueDictionary[tuple[int, str], Window]" = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Passed:
    """A call on the way back.

    Attributes:
        x: its input.
        dy: the gradient of its output.
        key: of the call.
        passage: the backward pass, and which of the key's calls in it: what belongs to one forward pass is alike.
        versions: of both tensors, to notice who overwrites them.
    """

    x: Tensor
    dy: Tensor
    key: str
    passage: tuple[int, int]
    versions: tuple[int, int]


class Window:
    """What was remembered of one weight since its gradient was last cleared; freed with whoever holds it."""

    def __init__(self, gradient: Callable[[], Tensor | None]) -> None:
        """`gradient` gives that of the active values at any time."""
        self._gradient = gradient
        self._passed: list[Passed] = []
        self._last: tuple[Tensor | None, int] | None = None  # the gradient after the last backward pass, its version
        self._awaited = -1  # the backward pass that is under way

    def add(self, x: Tensor, dy: Tensor, key: str) -> None:
        """To be called in a backward pass, before the pass adds to the gradient."""
        task = torch._C._current_graph_task_id()
        if task != self._awaited or task == -1:
            if self._was_cleared():
                self._passed = [passed for passed in self._passed if passed.passage[0] == task]
            self._awaited = task
            if task != -1:
                torch.autograd.Variable._execution_engine.queue_callback(self._note)
        turn = sum(passed.key == key and passed.passage[0] == task for passed in self._passed)
        self._passed.append(Passed(x, dy, key, (task, turn), (x._version, dy._version)))

    def take(self, name: str) -> list[list[Passed]]:
        """All calls, those of one forward pass together; they are forgotten.

        Raises:
            RuntimeStateError: a tensor of `name`'s calls was overwritten meanwhile.
        """
        passed = [] if self._was_cleared() else self._passed
        self.forget()
        if any((each.x._version, each.dy._version) != each.versions for each in passed):
            raise RuntimeStateError(
                f"the input of {name} was overwritten between backward() and optimizer.step(), and an update step "
                "needs it; give every batch a tensor of its own, or train without lower(train=True)"
            )
        passages = Counter(each.passage for each in passed)
        return [[each for each in passed if each.passage == passage] for passage in passages]

    def forget(self) -> None:
        self._passed, self._last, self._awaited = [], None, -1

    def __len__(self) -> int:
        return 0 if self._was_cleared() else len(self._passed)

    def _note(self) -> None:
        gradient = self._gradient()
        self._last = (gradient, -1 if gradient is None else gradient._version)
        self._awaited = -1

    def _was_cleared(self) -> bool:
        """Whether the gradient was taken away, or set to 0, since the last backward pass."""
        gradient = self._gradient()
        if gradient is None or self._last is None:
            return gradient is None
        before, version = self._last
        touched = gradient is not before or gradient._version != version
        return touched and gradient.numel() > 0 and not bool(gradient.any())


def new_run() -> int:
    """A number under which one module's activations are remembered."""
    return next(_numbers)


def watch(run: int, keys: Sequence[str], window: Window) -> None:
    """Has these calls of a module remember in `window`, as long as somebody holds it. Others remember nothing."""
    for key in keys:
        _windows[run, key] = window


@define("remember(Tensor y, Tensor x, int run, str key, bool copied) -> Tensor")
def _remember(y: Tensor, x: Tensor, run: int, key: str, copied: bool) -> Tensor:
    return y.clone()


@define("remember_gradient(Tensor dy, Tensor x, int run, str key, bool copied) -> Tensor")
def _remember_gradient(dy: Tensor, x: Tensor, run: int, key: str, copied: bool) -> Tensor:
    window = _windows.get((run, key))
    if window is not None:
        x, dy = x.detach(), dy.detach()
        window.add(*((x.clone(), dy.clone()) if copied else (x, dy)), key)
    return dy.clone()  # a result that is used: a compiler would drop the call otherwise


@torch.library.register_fake("fxsparse::remember")
def _(y, x, run, key, copied):
    return torch.empty_like(y)


@torch.library.register_fake("fxsparse::remember_gradient")
def _(dy, x, run, key, copied):
    return torch.empty_like(dy)


def _setup_context(ctx, inputs, output):
    _, x, ctx.run, ctx.key, ctx.copied = inputs
    ctx.save_for_backward(x)


def _backward(ctx, dy):
    (x,) = ctx.saved_tensors
    return torch.ops.fxsparse.remember_gradient(dy, x, ctx.run, ctx.key, ctx.copied), None, None, None, None


torch.library.register_autograd("fxsparse::remember", _backward, setup_context=_setup_context)


def remember(y: Tensor, x: Tensor, run: int, key: str) -> Tensor:
    """`y`; its gradient is remembered with `x` on the way back.

    A compiler reuses the memory of both as soon as nothing in its own graph reads them, so there they are copied.
    """
    return torch.ops.fxsparse.remember(y, x, run, key, torch.compiler.is_compiling())
