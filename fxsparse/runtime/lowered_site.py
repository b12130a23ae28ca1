"""The runtime's view of a weight that is stored as its active values: `MaskedSite`'s interface over a `SparsePattern`.

What a rewiring looks at has the weight's dense shape. It is made for one site at a time and thrown away.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.records import WeightSite
from ..core.sharded_tensors import is_sharded
from ..kernels import SparsePattern, update_steps
from ..passes.find_lowerable import SparseCall
from ..passes.lower_weights import RUN, pattern_names
from .masked_site import MaskedModule, MaskedSite
from .resizing import resize_parameter
from .sharded_site import ShardedSite
from .sites import DenseGradient

ADVICE = "train without lower(train=True)"


@dataclass(frozen=True)
class Storage:
    """How a weight is stored.

    Attributes:
        shape: of the dense weight.
        block: output channels that share a pattern.
        calls: of the weight.
    """

    shape: tuple[int, ...]
    block: int
    calls: tuple[SparseCall, ...]

    @property
    def groups(self) -> int:
        return self.calls[0].groups


def pattern_of(module: Any, name: str, storage: Storage) -> SparsePattern:
    """The pattern whose tensors are the buffers of a lowered weight."""
    starts, columns, *by_columns = (module.get_buffer(buffer) for buffer in pattern_names(name))
    t_starts, t_rows, t_places = by_columns
    return SparsePattern(
        *(storage.shape, storage.groups, storage.block, starts, columns, t_starts, t_rows, t_places), check=False
    )


def set_pattern(module: Any, name: str, pattern: SparsePattern) -> None:
    """Keeps a pattern in buffers that no `state_dict` shows."""
    for buffer, tensor in zip(pattern_names(name), pattern.tensors, strict=True):
        owner, _, last = buffer.rpartition(".")
        module.get_submodule(owner).register_buffer(last, tensor, persistent=False)


def drop_pattern(module: Any, name: str) -> None:
    for buffer in pattern_names(name):
        owner, _, last = buffer.rpartition(".")
        holder = module.get_submodule(owner)
        del holder._buffers[last]
        holder._non_persistent_buffers_set.discard(last)


def store_values(
    module: Any, name: str, storage: Storage, mask: Tensor, optimizer: torch.optim.Optimizer | None
) -> None:
    """From a dense parameter to its active values, the optimizer's state of its shape along with it."""
    pattern = SparsePattern.of(mask, storage.groups, storage.block)
    resize_parameter(module.get_parameter(name), name, optimizer, pattern.gather, ADVICE)
    set_pattern(module, name, pattern)


def restore_dense(module: Any, name: str, storage: Storage, optimizer: torch.optim.Optimizer | None) -> Tensor:
    """The way back; returns the mask."""
    pattern = pattern_of(module, name, storage)
    resize_parameter(module.get_parameter(name), name, optimizer, pattern.scatter, ADVICE)
    drop_pattern(module, name)
    return pattern.mask()


class LoweredSite(MaskedSite):
    """A site whose parameter holds its active values, (count), in the order of its pattern."""

    def __init__(self, module: MaskedModule, site: WeightSite, target: int, storage: Storage) -> None:
        super().__init__(module, site, target)
        self.storage = storage
        self._window = update_steps.Window(lambda: self.parameter.grad)
        update_steps.watch(getattr(module, RUN), [call.key for call in storage.calls], self._window)

    @property
    def pattern(self) -> SparsePattern:
        return pattern_of(self.module, self.name, self.storage)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made now."""
        return self.pattern.scatter(self.parameter.detach())

    @property
    def stored_mask(self) -> Tensor:
        """Nothing stores it."""
        return self.mask

    @property
    def mask(self) -> Tensor:
        """The mask, made now."""
        return self.pattern.mask()

    @property
    def active(self) -> int:
        return self.parameter.numel()

    def count(self) -> int:
        return self.active

    def gradient(self) -> Tensor | None:
        """The gradient of the active weights, of the dense shape with zeros; None where there was none."""
        gradient = self.parameter.grad
        return None if gradient is None else self.pattern.scatter(gradient)

    def deferred_gradient(self, magnitude: bool) -> DenseGradient | None:
        """What forms the dense gradient of the calls since the gradient was cleared; None where there were none."""
        return partial(self._dense_gradient, magnitude) if len(self._window) else None

    @torch.no_grad()
    def _dense_gradient(self, magnitude: bool) -> Tensor:
        """Of the remembered calls, which are forgotten; with `magnitude`, the magnitude of each pass counts."""
        total = self.parameter.new_zeros(self.storage.shape)
        calls = {call.key: call for call in self.storage.calls}
        for passage in self._window.take(self.name):
            parts = [dense_weight_gradient(calls[each.key], each.x, each.dy) for each in passage]
            gradient = sum(parts[1:], parts[0]).reshape(self.storage.shape)
            total += gradient.abs() if magnitude else gradient
        return total

    def forget(self) -> None:
        """Forgets what was remembered for a dense gradient."""
        self._window.forget()

    def zero_gradient(self) -> Tensor:
        return self.parameter.new_zeros(self.storage.shape)

    def momentum(self, optimizer: torch.optim.Optimizer) -> Tensor:
        return self.pattern.scatter(self._mean_of_gradients(optimizer))

    def mask_gradient_(self, only_infinite: bool = False) -> None:
        """Nothing: only active weights have a gradient."""

    def apply_mask_(self) -> None:
        """Nothing: inactive weights are not stored."""

    def stray_weights(self) -> Tensor:
        return torch.zeros((), dtype=torch.int64)

    def stray_state(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        return []

    def has_zeros(self) -> bool:
        return False

    def note_zeros(self) -> None:
        """Nothing: there are none in storage."""

    def forget_zeros(self) -> None:
        """Nothing."""

    @torch.no_grad()
    def take_over(
        self,
        mask: Tensor,
        active: int | None,
        optimizer: torch.optim.Optimizer,
        kept: Tensor | None = None,
        optimizer_state: str = "masked",
    ) -> Tensor:
        """As `MaskedSite.take_over`; values and the optimizer's state move to their places in the new pattern."""
        assert optimizer_state == "masked", optimizer_state
        old = self.pattern
        before = old.mask()
        new = SparsePattern.of(mask, old.groups, old.block)
        untouched = before if kept is None else before & kept

        def moved(values: Tensor) -> Tensor:
            return new.gather(old.scatter(values).masked_fill_(~untouched, 0))

        resize_parameter(self.parameter, self.name, optimizer, moved, ADVICE)
        set_pattern(self.module, self.name, new)
        return mask & ~before


def dense_weight_gradient(call: SparseCall, x: Tensor, dy: Tensor) -> Tensor:
    """The gradient of a call's whole weight, of the shape `call.weight`."""
    if call.linear:
        return dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    unused = x.new_zeros(()).expand(call.weight)
    return torch.ops.aten.convolution_backward(
        dy, x, unused, None, call.stride, call.padding, call.dilation, False, (0, 0), call.groups, (False, True, False)
    )[1]


def weight_site(module: MaskedModule, site: WeightSite, target: int) -> MaskedSite:
    """The site of a weight, as it is stored now."""
    storage = module.lowered.get(site.name)
    if is_sharded(module.get_parameter(site.name)):
        return ShardedSite(module, site, target)
    return MaskedSite(module, site, target) if storage is None else LoweredSite(module, site, target, storage)
