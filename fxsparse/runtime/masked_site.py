"""The runtime's view of a weight that is stored densely; the interfaces that it has are those of `sites.py`."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.channel_sites import ChannelSite
from ..core.errors import RuntimeStateError
from ..core.granularity import Granularity, UnitLayout
from ..core.group_layout import GroupLayout
from ..core.known_zeros import forget_zeros, has_zeros, is_masked, note_zeros
from ..core.packed_masks import is_packed, pack_mask, unpack_mask
from ..core.records import WeightSite
from ..core.sharded_tensors import local_part
from ..core.zeroing import zero_outside_
from .sites import DenseGradient, Site, StoredSite
from .update_rules import snip_score


class MaskedModule(Protocol):
    """What the runtime needs of a module: its sites, its tensors by name, and the gate."""

    sites: tuple[WeightSite, ...]
    granularity: Granularity
    unit_layouts: Mapping[str, UnitLayout]
    group_layouts: Mapping[str, GroupLayout]
    dense_gradient: bool | str
    _rewirer: Any

    @property
    def lowered(self) -> Mapping[str, Any]: ...

    @property
    def channel_sites(self) -> tuple[ChannelSite, ...]: ...

    def get_parameter(self, target: str) -> nn.Parameter: ...

    def get_buffer(self, target: str) -> Tensor: ...

    def get_submodule(self, target: str) -> nn.Module: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...


class MaskedSite(Site, StoredSite):
    """A site stored densely, a parameter with zeros, and its bool mask beside it; its units are its weights."""

    units = "weights"

    def __init__(self, module: MaskedModule, site: WeightSite, target: int) -> None:
        """`target` is the number of active weights that the allocation gives the site."""
        self.module = module
        self.name = site.name
        self.size = site.numel
        self.output_dim = site.output_dim or 0
        self.target = target
        holder, _, self._parameter_name = site.name.rpartition(".")
        self._holder = module.get_submodule(holder)
        self._mask_name = site.mask_name.rpartition(".")[2]
        self.groups = module.group_layouts.get(site.name)
        self._counted: tuple[Tensor | None, int] = (None, -1)  # mask and its version, as of `_active`
        self._active: int | Tensor = 0

    # Looked up by name each time: loading with `assign=True` replaces the Parameter object.
    @property
    def parameter(self) -> nn.Parameter:
        """What the optimizer holds."""
        return getattr(self._holder, self._parameter_name)

    @property
    def weight(self) -> Tensor:
        """The weight, dense."""
        return self.parameter

    @property
    def stored_mask(self) -> Tensor:
        """The mask as the module has it: bool, or its bits."""
        return getattr(self._holder, self._mask_name)

    @property
    def mask(self) -> Tensor:
        return unpack_mask(self.stored_mask, self.parameter.shape)

    @property
    def active(self) -> int:
        """Number of active weights; counted anew only after somebody else changed the mask.

        `RuntimeStateError` if it was changed to one that has not N active weights in every group of M.
        """
        stored, (counted, version) = self.stored_mask, self._counted
        if stored is not counted or stored._version != version:
            mask = self.mask
            if self.groups is not None and not self.groups.holds(mask):
                raise RuntimeStateError(
                    f"the mask of {self.name} does not have {self.groups.keep} active in every {self.groups.of} "
                    "weights: it was changed from outside; keep their number, or use granularity='weight'"
                )
            self._active = int(mask.sum())
            self._counted = (stored, stored._version)
        self._active = int(self._active)
        return self._active

    def count(self) -> int | Tensor:
        stored, (counted, version) = self.stored_mask, self._counted
        return self._active if stored is counted and stored._version == version else self.active

    def magnitude(self) -> Tensor:
        """The magnitude of each weight, of the weight's shape."""
        return self.weight.detach().abs()

    def dead_units(self) -> tuple[int, int, int, int]:
        """Output units (rows, filters) without an active weight, all of them; the same of input units. Waits."""
        mask = self.mask
        inputs, outputs = mask.transpose(0, 1).flatten(1).any(1), mask.flatten(1).any(1)
        if self.output_dim == 1:
            inputs, outputs = outputs, inputs
        return int((~outputs).sum()), len(outputs), int((~inputs).sum()), len(inputs)

    def gradient(self) -> Tensor | None:
        """The gradient in `weight.grad`, at all positions on update steps; None where there was none."""
        return self.parameter.grad

    def deferred_gradient(self, magnitude: bool) -> DenseGradient | None:
        """None: a dense gradient is there."""
        return None

    def forget(self) -> None:
        """Nothing is remembered."""

    def zero_gradient(self) -> Tensor:
        return torch.zeros_like(self.weight)

    def score(self, values: Tensor) -> Tensor:
        """The magnitude of each value."""
        return values.abs()

    def sensitivity(self, gradient: Tensor) -> Tensor:
        """`|weight * gradient|` at each position."""
        return snip_score(self.weight, gradient)

    def momentum(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """The optimizer's running mean of the weight's gradients, of the weight's shape; 0 before its first step.

        SGD's momentum buffer; Adam's first moment over the root of the second (as the report's code takes it).
        """
        return self._mean_of_gradients(optimizer)

    def _mean_of_gradients(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """`momentum`, of the parameter's shape."""
        parameter = self.parameter
        state = optimizer.state.get(parameter, {})
        if isinstance(state.get("momentum_buffer"), Tensor):
            return state["momentum_buffer"]
        if not isinstance(state.get("exp_avg"), Tensor):
            return torch.zeros_like(parameter)
        if isinstance(state.get("exp_avg_sq"), Tensor) and state["exp_avg_sq"].shape == parameter.shape:
            return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
        return state["exp_avg"]

    def group(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer's parameter group that holds the weight: its learning rate and other settings."""
        parameter = self.parameter
        return next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))

    @torch.no_grad()
    def mask_gradient_(self, only_infinite: bool = False) -> None:
        gradient = self.gradient()
        if gradient is not None:
            zero_outside_(gradient, self.mask | torch.isfinite(gradient) if only_infinite else self.mask)

    @torch.no_grad()
    def apply_mask_(self) -> None:
        zero_outside_(self.weight, self.mask)
        self.note_zeros()

    @torch.no_grad()
    def stray_weights(self) -> Tensor:
        """Number of inactive positions whose stored weight is not 0 (0-dim, on the device)."""
        return ((self.weight != 0) & ~self.mask).count_nonzero()

    @torch.no_grad()
    def stray_state(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """The same of each of the optimizer's buffers of the weight's shape."""
        inactive = ~self.mask
        return [
            ((buffer != 0) & inactive).count_nonzero()
            for buffer in optimizer.state.get(self.parameter, {}).values()
            if isinstance(buffer, Tensor) and buffer.shape == inactive.shape
        ]

    def has_masked_gradient(self) -> bool:
        """Whether there is no gradient, or one that is known to be 0 where weights are inactive."""
        gradient = self.gradient()
        return gradient is None or is_masked(gradient, self.stored_mask)

    def has_zeros(self) -> bool:
        """Whether inactive weights are known to be 0 in storage."""
        return has_zeros(self.parameter, self.stored_mask)

    def note_zeros(self) -> None:
        """They are; the forward pass then need not multiply."""
        note_zeros(self.parameter, self.stored_mask)

    def forget_zeros(self) -> None:
        """They may not be any longer."""
        forget_zeros(self.stored_mask)

    def grown(self, mask: Tensor) -> Tensor:
        return mask & ~self.mask

    @torch.no_grad()
    def take_over(
        self,
        mask: Tensor,
        active: int | None,
        optimizer: torch.optim.Optimizer,
        kept: Tensor | None = None,
        optimizer_state: str = "masked",
    ) -> Tensor:
        """Replaces the pattern in place; see `Site.take_over`. `active` None is counted, and read when asked for."""
        weight, own = self.weight, self.mask
        grown = mask & ~own
        untouched = mask & own if kept is None else mask & own & kept
        zero_outside_(weight, untouched)
        if optimizer_state != "kept":
            spared = untouched if optimizer_state == "masked" else untouched | ~mask
            for state in optimizer.state.get(self.parameter, {}).values():
                if isinstance(state, Tensor) and state.shape == self.parameter.shape:
                    zero_outside_(local_part(state), spared)
        stored = self.stored_mask
        stored.copy_(pack_mask(mask) if is_packed(stored) else mask)
        self._active = mask.count_nonzero() if active is None else active
        self._counted = (stored, stored._version)
        return grown
