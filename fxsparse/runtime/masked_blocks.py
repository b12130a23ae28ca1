"""A weight whose elements are dropped and grown in units: blocks now, whatever has a `UnitLayout`."""

import torch
from torch import Tensor

from ..core.errors import RuntimeStateError
from ..core.granularity import UnitLayout
from .masked_site import MaskedSite
from .sites import DenseGradient, Site


class MaskedBlocks(Site):
    """The units of one weight as connections: unit tensors have the shape `layout.grid`.

    Gradients and the optimizer's momentum stay as they are, an element each, until `score` takes the mean of their
    magnitudes over every unit.
    """

    units = "blocks"

    def __init__(self, weights: MaskedSite, layout: UnitLayout, target: int) -> None:
        """`target` is the number of active units that the allocation gives the weight."""
        self.name = weights.name
        self.size = layout.units
        self.target = target
        self._weights = weights
        self._layout = layout
        self._counted: tuple[Tensor | None, int] = (None, -1)  # mask of the weights and its version, as of `_mask`
        self._mask = torch.empty(0, dtype=torch.bool)
        self._active = 0

    @property
    def mask(self) -> Tensor:
        """Which units are active (bool); `RuntimeStateError` after a mask was changed to one that cuts units."""
        self._read()
        return self._mask

    @property
    def active(self) -> int:
        """Number of active units; counted anew only after somebody else changed the mask."""
        self._read()
        return self._active

    def _read(self) -> None:
        stored, (counted, version) = self._weights.stored_mask, self._counted
        if stored is counted and stored._version == version:
            return
        own = self._weights.mask
        if not self._layout.is_whole(own):
            raise RuntimeStateError(
                f"the mask of {self.name} does not consist of whole {self.units}: it was changed from outside; change "
                "it block by block, or use granularity='weight'"
            )
        self._note(stored, self._layout.gather(own).contiguous())
        self._active = int(self._mask.sum())

    def _note(self, stored: Tensor, mask: Tensor) -> None:
        self._mask, self._counted = mask, (stored, stored._version)

    def magnitude(self) -> Tensor:
        """The mean magnitude of each unit's weights."""
        return self._layout.mean(self._weights.magnitude())

    def gradient(self) -> Tensor | None:
        """The gradient of each weight; see `MaskedSite.gradient`."""
        return self._weights.gradient()

    def deferred_gradient(self, magnitude: bool) -> DenseGradient | None:
        return self._weights.deferred_gradient(magnitude)

    def zero_gradient(self) -> Tensor:
        return self._weights.zero_gradient()

    def score(self, values: Tensor) -> Tensor:
        """The mean magnitude over each unit of `values`, which are of the weight's shape."""
        return self._layout.mean(self._weights.score(values))

    def momentum(self, optimizer: torch.optim.Optimizer) -> Tensor:
        return self._weights.momentum(optimizer)

    def sensitivity(self, gradient: Tensor) -> Tensor:
        return self._layout.mean(self._weights.sensitivity(gradient))

    def grown(self, mask: Tensor) -> Tensor:
        return self._layout.spread(mask) & ~self._weights.mask

    @torch.no_grad()
    def take_over(
        self,
        mask: Tensor,
        active: int,
        optimizer: torch.optim.Optimizer,
        kept: Tensor | None = None,
        optimizer_state: str = "masked",
    ) -> Tensor:
        """Replaces the pattern; see `Site.take_over`. Returns the grown weights (bool, the weight's shape)."""
        spread = self._layout.spread
        elements = self._layout.elements(active) if self._layout.even else None
        own_kept = None if kept is None else spread(kept)
        grown = self._weights.take_over(spread(mask), elements, optimizer, own_kept, optimizer_state)
        self._note(self._weights.stored_mask, mask)
        self._active = active
        return grown
