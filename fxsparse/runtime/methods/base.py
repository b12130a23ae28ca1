"""What a sparse-training method is: what it needs, and how it drops and grows. The rest is shared."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ...core.masking import floor_count, seeded_generator
from ..masked_site import MaskedSite
from ..schedule import UpdateSchedule


class Need(Enum):
    """When a method needs the gradient of inactive weights in `weight.grad`."""

    NEVER = "never"
    UPDATES = "on update steps"
    ALWAYS = "at every step"


@dataclass(frozen=True)
class Moment:
    """The circumstances of one rewiring.

    Attributes:
        step: number of optimizer steps already made.
        fraction: fraction of the active connections to rewire (the decayed alpha).
        seed: the run's seed; random choices draw from `generator`.
        optimizer: for methods that read its momentum.
    """

    step: int
    fraction: float
    seed: int
    optimizer: torch.optim.Optimizer

    def generator(self, site: MaskedSite) -> torch.Generator:
        """A CPU generator of its own for each site and step: the same on every rank, and after a resume."""
        return seeded_generator(self.seed, "rewire", self.step, site.name)


@dataclass(frozen=True)
class Quota:
    """How many connections a site loses and gains in one rewiring; equal unless the method moves densities."""

    drop: int
    grow: int


class Method:
    """Base class of the methods, and by itself the one that never rewires.

    A method overrides `rewire`, and where it needs to: `quotas` (densities that move between sites or over
    time), `observe` (moving averages of gradients), `state_dict` (what it remembers), `initial_sparsity`.
    """

    name = "static"
    summary = "random masks, never rewired"
    dense_gradient = Need.NEVER
    rewires = False

    def initial_sparsity(self, sparsity: float) -> float:
        """The sparsity to start from when the user asks for `sparsity`."""
        return sparsity

    def quotas(self, sites: Sequence[MaskedSite], moment: Moment) -> list[Quota]:
        """How many connections to drop and grow at each site: `k = floor(fraction * active)` of both."""
        counts = [floor_count(moment.fraction, site.active) for site in sites]
        return [Quota(k, k) for k in counts]

    def rewire(self, site: MaskedSite, gradient: Tensor | None, quota: Quota, moment: Moment) -> Tensor:
        """The site's new mask (bool, the weight's shape) with `active - drop + grow` positions True.

        Args:
            gradient: the dense gradient, if the method asked for it; finite.
        """
        return site.mask

    def observe(self, sites: Sequence[MaskedSite], step: int) -> None:
        """Called before every optimizer step, while the gradients are dense, if they are needed always."""

    def state_dict(self) -> dict[str, Any]:
        """What the method remembers between steps, for exact resumption."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""

    def dense_gradient_steps(self, schedule: UpdateSchedule, total_steps: int) -> int:
        """On how many of a run's steps the gradient of all weights is computed, for the FLOP ledger."""
        if self.dense_gradient is Need.ALWAYS:
            return total_steps
        return schedule.update_steps(total_steps) if self.dense_gradient is Need.UPDATES else 0
