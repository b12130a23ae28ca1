"""How many of a module's weights are active: now, when the allocation is reached, and over a run."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .channels.channel_plan import elements_left
from .core.channel_sites import ChannelPlan
from .core.granularity import UnitLayout
from .core.masking import floor_count
from .core.records import WeightSite
from .core.sharded_tensors import count_true
from .runtime.methods import Method
from .runtime.schedule import Schedule


class MaskCounts:
    """The part of `SparseModule` that counts; weights in this order are those of `sites`."""

    sites: tuple[WeightSite, ...]
    target_sparsities: dict[str, float]
    method: Method
    channels: ChannelPlan | None
    unit_layouts: Mapping[str, UnitLayout]

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Weight name -> bool mask."""
        raise NotImplementedError

    def schedule(self, total_steps: int) -> Schedule:
        """When and how much the masks change in a run."""
        raise NotImplementedError

    parameters: Any  # of the module

    @property
    def active_counts(self) -> dict[str, int]:
        """Weight name -> number of active weights."""
        first = self.method.initial_sparsity
        return {
            name: self._elements(name, self._kept_units(name, first(self.target_sparsities[name])))
            if mask.is_meta
            else count_true(mask)
            for name, mask in self.masks.items()
        }

    @property
    def target_counts(self) -> dict[str, int]:
        """Weight name -> number of active weights that the allocation gives it; the masks need not be there yet."""
        return {name: self._elements(name, kept) for name, kept in self.target_units.items()}

    @property
    def target_units(self) -> dict[str, int]:
        """Weight name -> number of active units (weights, or blocks of them) that the allocation gives it."""
        return {site.name: self._kept_units(site.name, self.target_sparsities[site.name]) for site in self.sites}

    @property
    def unit_counts(self) -> dict[str, int]:
        """Weight name -> number of its units: of its elements, or of blocks of them."""
        layouts = self.unit_layouts
        return {site.name: layouts[site.name].units if layouts else site.numel for site in self.sites}

    def _kept_units(self, name: str, sparsity: float) -> int:
        units = self.unit_counts[name]
        return units - floor_count(sparsity, units)

    def _elements(self, name: str, units: int) -> int:
        """How many elements of a weight so many units have; on average, where they differ in size."""
        return self.unit_layouts[name].elements(units) if self.unit_layouts else units

    @property
    def target_parameters(self) -> int:
        """Number of parameters with the allocation's active weights: those, and all that has no mask."""
        masked_out = sum(site.numel for site in self.sites) - sum(self.target_counts.values())
        return sum(parameter.numel() for parameter in self.parameters()) - masked_out

    @property
    def densities(self) -> dict[str, float]:
        """Weight name -> fraction of its elements that are active now."""
        counts = self.active_counts
        return {site.name: counts[site.name] / site.numel for site in self.sites}

    @property
    def sparsity(self) -> float:
        """Fraction of the elements of all sites that are masked out now."""
        return 1.0 - sum(self.active_counts.values()) / sum(site.numel for site in self.sites)

    def planned_counts(self, total_steps: int) -> list[tuple[int, dict[str, int]]]:
        """From which step of a run on each weight will have how many active elements, as far as it can be known."""
        if self.channels is not None:
            planned = self.method.planned_counts(
                {site.name: site.size for site in self.channels.sites},
                self.channels.targets,
                self.schedule(total_steps),
                total_steps,
            )
            return elements_left(self.channels, {site.name: site.shape for site in self.sites}, planned)
        if self.method.initial_sparsity(0.5) == 0.5:
            sizes, targets = {site.name: site.numel for site in self.sites}, self.active_counts
            return self.method.planned_counts(sizes, targets, self.schedule(total_steps), total_steps)
        planned = self.method.planned_counts(
            self.unit_counts, self.target_units, self.schedule(total_steps), total_steps
        )
        return [(step, {name: self._elements(name, kept) for name, kept in counts.items()}) for step, counts in planned]
