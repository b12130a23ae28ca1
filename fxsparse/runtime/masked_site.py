"""The runtime's view of one weight site: the small interface through which every method works.

Magnitudes of the active weights, the dense gradient, a new pattern to take over, the optimizer's state to
move along. A site that stores its weights in another way (values only, groups of channels, a shard) brings
the same interface.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.records import WeightSite


class MaskedModule(Protocol):
    """What the runtime needs of a module: its sites, its tensors by name, and the gate."""

    sites: tuple[WeightSite, ...]
    dense_gradient: bool
    _rewirer: Any

    def get_parameter(self, target: str) -> nn.Parameter: ...

    def get_buffer(self, target: str) -> Tensor: ...


class MaskedSite:
    """A site stored densely: a parameter with zeros, and its bool mask beside it."""

    def __init__(self, module: MaskedModule, name: str, mask_name: str) -> None:
        self.module = module
        self.name = name
        self._mask_name = mask_name
        self._counted_version = -1
        self._active = 0

    # Looked up by name each time: loading with `assign=True` replaces the Parameter object.
    @property
    def weight(self) -> nn.Parameter:
        return self.module.get_parameter(self.name)

    @property
    def mask(self) -> Tensor:
        return self.module.get_buffer(self._mask_name)

    @property
    def active(self) -> int:
        """Number of active weights; counted anew only after somebody else changed the mask."""
        mask = self.mask
        if mask._version != self._counted_version:
            self._active = int(mask.sum())
            self._counted_version = mask._version
        return self._active

    def dense_gradient(self) -> Tensor | None:
        """The gradient in `weight.grad`, at all positions on update steps; None where there was none."""
        return self.weight.grad

    @torch.no_grad()
    def mask_gradient_(self) -> None:
        """Turns a dense gradient into what an ordinary step needs."""
        if self.weight.grad is not None:
            self.weight.grad.mul_(self.mask)

    @torch.no_grad()
    def apply_mask_(self) -> None:
        self.weight.masked_fill_(~self.mask, 0)

    @torch.no_grad()
    def stray_weights(self) -> Tensor:
        """Number of inactive positions whose stored weight is not 0 (0-dim, on the device)."""
        return ((self.weight != 0) & ~self.mask).count_nonzero()

    @torch.no_grad()
    def take_over(self, mask: Tensor, active: int, optimizer: torch.optim.Optimizer) -> Tensor:
        """Replaces the pattern in place.

        Connections in both patterns are untouched. All others, new or gone, get weight 0 and 0 in every
        buffer of the weight's shape that the optimizer keeps for it (momentum, Adam's moments).

        Args:
            mask: the new pattern, bool.
            active: its number of active positions, known in advance.

        Returns:
            Number of positions that were inactive and are active now (0-dim, on the device).
        """
        weight, own = self.weight, self.mask
        grown = (mask & ~own).sum()
        cleared = ~(mask & own)
        weight.masked_fill_(cleared, 0)
        for state in optimizer.state.get(weight, {}).values():
            if isinstance(state, Tensor) and state.shape == weight.shape:
                state.masked_fill_(cleared, 0)
        own.copy_(mask)
        self._active, self._counted_version = active, own._version
        return grown
