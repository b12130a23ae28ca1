"""The two interfaces through which the runtime reaches a weight site.

Methods and rewirings see a `Site`: *units* (single weights, blocks of them, channels) with a mask, scores, and a
pattern to take over. The hooks between rewirings see a `StoredSite`: the weights of one parameter as they are stored.

| class | `Site`: a unit is | `StoredSite` |
| --- | --- | --- |
| `MaskedSite` | one weight | yes: a dense parameter, its mask beside it |
| `LoweredSite` | one weight | yes: a parameter of active values, and their pattern |
| `ShardedSite` | one weight | yes: this rank's rows of a dense parameter and of its mask |
| `MaskedBlocks` | one unit of a `UnitLayout` | no: acts through the site of its weight |
| `MaskedChannels` | one atom of a channel group | no: acts through the `ChannelState` |

Nothing here says how a parameter is stored. A site that keeps its active values only may give `magnitude` any value at
inactive units (nothing reads it there), and forms its dense gradient when it is asked.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..core.group_layout import GroupLayout
from .shards import WHOLE, Whole

DenseGradient = Callable[[], Tensor]
"""Forms a dense gradient, once."""


class Site(Protocol):
    """What is dropped and grown at one place: what methods and rewirings see.

    A *unit tensor* has one value a unit; its flat order is the one in which ties are broken. What the units of one
    weight come to in single weights is known to `take_over` and to nobody before it.

    Attributes:
        name: of the weight, or of the group of channels.
        size: number of units.
        target: number of active units that the allocation gives the site.
        units: what they are called in messages.
        groups: where each group of M weights keeps N active, those groups.
        shards: how they lie over the ranks. Unit tensors are this rank's part, numbers the whole's.
    """

    name: str
    size: int
    target: int
    units: str
    groups: GroupLayout | None = None
    shards: Whole = WHOLE

    @property
    def mask(self) -> Tensor:
        """Which units are active: bool, a unit tensor. To be read only; it changes by `take_over`."""
        ...

    @property
    def active(self) -> int:
        """Number of active units, without waiting for the device unless somebody else changed the mask."""
        ...

    def magnitude(self) -> Tensor:
        """Of each active unit the (mean) magnitude of its weights: a unit tensor, what drops go by."""
        ...

    def gradient(self) -> Tensor | None:
        """The gradient that there is now, dense on update steps; None where there is none.

        Its shape is the site's own affair (single weights: the weight's). Sums and differences of such tensors, the
        moving averages of a method, make sense; what they say of the units is `score`.
        """
        ...

    def deferred_gradient(self, magnitude: bool) -> DenseGradient | None:
        """What forms the dense gradient where `gradient` is not dense on update steps; None where it is, or was none.

        With `magnitude`, of several backward passes in a step the magnitudes are summed.
        """
        ...

    def zero_gradient(self) -> Tensor:
        """Zeros in the form of `gradient`."""
        ...

    def score(self, values: Tensor) -> Tensor:
        """What `gradient`, or what is made of it, says of each unit: its (mean) magnitude, a unit tensor."""
        ...

    def momentum(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """The optimizer's running mean of the gradients, in the form of `gradient`; 0 before its first step."""
        ...

    def sensitivity(self, gradient: Tensor) -> Tensor:
        """The (mean) `|weight * gradient|` of each unit: a unit tensor; `gradient` in the form of `gradient()`."""
        ...

    def grown(self, mask: Tensor) -> Tensor:
        """What `take_over` of a mask would return; nothing is changed."""
        ...

    def take_over(
        self,
        mask: Tensor,
        active: int,
        optimizer: torch.optim.Optimizer,
        kept: Tensor | None = None,
        optimizer_state: str = "masked",
    ) -> Tensor:
        """Replaces the pattern in place, and moves weights and optimizer state along.

        Connections in both patterns are untouched. All others, new or gone, get weight 0 and 0 in every
        buffer of the weight's shape that the optimizer keeps for it (momentum, Adam's moments).

        Args:
            mask: the new pattern, bool, a unit tensor.
            active: its number of active units, known in advance.
            kept: if given, only these of the units in both patterns are untouched; the others start anew.
            optimizer_state: `"masked"` as above; `"new"` clears the buffers at new connections only; `"kept"` nowhere.

        Returns:
            What was inactive and is active now: bool, in the form of `gradient`.
        """
        ...


class StoredSite(Protocol):
    """The weights of one parameter as they are stored: what the hooks between rewirings, counts and reports see.

    Attributes:
        name: of the weight.
        size: number of its elements.
    """

    name: str
    size: int

    @property
    def mask(self) -> Tensor:
        """Which elements are active: bool, the weight's shape."""
        ...

    @property
    def active(self) -> int:
        """Number of active elements, without waiting for the device unless somebody else changed the mask."""
        ...

    def count(self) -> int | Tensor:
        """`active`; a tensor (0-dim, on the device) where that is not known without waiting."""
        return self.active

    def dead_units(self) -> tuple[int, int, int, int]:
        """Output units (rows, filters) without an active weight, all of them; the same of input units. Waits."""
        ...

    def mask_gradient_(self, only_infinite: bool = False) -> None:
        """Turns a dense gradient into what an ordinary step needs.

        With `only_infinite` it stays dense but for what is infinite or NaN at inactive positions: one such number
        would stay in the optimizer's buffers for good.
        """
        ...

    def apply_mask_(self) -> None:
        """Sets what is stored at inactive positions to 0; nothing to do where nothing is stored there."""
        ...

    def stray_weights(self) -> Tensor:
        """Number of inactive positions whose stored weight is not 0 (0-dim, on the device)."""
        ...

    def stray_state(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """The same of each of the optimizer's buffers of the weight's shape."""
        ...

    def has_zeros(self) -> bool:
        """Whether inactive weights are known to be 0 in storage: see `core.known_zeros`."""
        ...

    def note_zeros(self) -> None:
        """They are; the forward pass then need not multiply."""
        ...

    def forget_zeros(self) -> None:
        """They may not be any longer, even if no version counter tells."""
        ...


class Watched(Protocol):
    """What telemetry reads, of weights or of channels."""

    name: str
    size: int
    shards: Whole

    @property
    def mask(self) -> Tensor: ...

    @property
    def active(self) -> int: ...

    def dead_units(self) -> tuple[int, int, int, int]: ...
