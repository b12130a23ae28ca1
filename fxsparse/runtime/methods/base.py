"""What a sparse-training method is: what it needs, and how it drops and grows. The rest is shared."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...core.errors import RuntimeStateError
from ...core.group_layout import GroupLayout
from ...core.masking import ceil_count, floor_count, seeded_generator
from ..group_selection import rewire_in_groups
from ..redistribution import check_redistribution, redistribute
from ..schedule import Schedule, UpdateSchedule
from ..semantics import Semantics
from ..sites import Site


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
        fraction: what the schedule says: the fraction of the active connections to rewire (the decayed alpha), or for
            pruning the sparsity to have over the final one.
        seed: the run's seed; random choices draw from `generator`.
        optimizer: for methods that read its momentum or its learning rate.
        semantics: the choices on which published implementations differ.
    """

    step: int
    fraction: float
    seed: int
    optimizer: torch.optim.Optimizer
    semantics: Semantics = field(default_factory=Semantics)

    def generator(self, site: Site) -> torch.Generator:
        """A CPU generator of its own for each site and step: the same on every rank, and after a resume."""
        return seeded_generator(self.seed, "rewire", self.step, site.name)

    def lottery(self, site: Site) -> Tensor:
        """A random number for each position of the site, on its device: the score of a method that grows at random."""
        return site.shards.lottery(site.mask, self.generator(site))

    def count(self, site: Site) -> int:
        """k: how many of the site's connections to rewire."""
        rounded = ceil_count if self.semantics.rounding == "ceil" else floor_count
        k = rounded(self.fraction, site.active)
        return min(k, site.size - site.active) if self.semantics.regrown == "forbidden" else k


class Quota(NamedTuple):
    """How many connections a site loses and gains in one rewiring; equal unless the method moves densities."""

    drop: int
    grow: int


class Pattern(NamedTuple):
    """What a site takes over.

    Attributes:
        mask: bool, one a unit of the site (the weight's shape, of single weights), as `Site.mask`.
        active: its number of active positions, known without counting.
        kept: the connections that go on as they are: those that were not dropped.
    """

    mask: Tensor
    active: int
    kept: Tensor


@dataclass(kw_only=True, eq=False)
class Method:
    """Base class of the methods, and by itself the one that never rewires.

    A drop-and-grow method gives `grow_score`, and `drop_score` if it does not drop by magnitude. Densities that
    move: `quotas`, or, where a choice is over all sites at once, `new_patterns`. Moving averages: `observe` and
    `state_dict`. A start that is denser than the goal: `initial_sparsity`. Fields of the class are its options.

    Attributes:
        redistribution: by what connections move between the sites in a rewiring: None or `"none"` (every site regrows
            what it dropped), or the mean magnitude of the active weights' `"gradient"` or `"momentum"`. Sites that the
            allocation makes dense stay dense.
    """

    name: ClassVar[str] = "static"
    summary: ClassVar[str] = "random masks, never rewired"
    dense_gradient: ClassVar[Need] = Need.NEVER
    rewires: ClassVar[bool] = False  # whether masks change at all
    grows: ClassVar[bool] = False  # whether it wakes inactive connections in a rewiring
    replaces_update: ClassVar[bool] = True  # whether, in its own paper, a rewiring takes the weight update's place
    one_shot: ClassVar[bool] = False  # whether a rewiring that cannot be done has to come later
    needs_masks: ClassVar[bool] = False  # whether the user has to give the masks
    step_options: ClassVar[tuple[str, ...]] = ()  # options that are steps of the run, and stretch with it
    granularities: ClassVar[tuple[str, ...]] = ("weight",)  # what it can drop and grow as one
    over_shards: ClassVar[bool] = False  # whether it looks beyond its part of a weight through `site.shards` alone
    changes_widths: ClassVar[bool] = False  # whether the model itself has to be another one

    redistribution: str | None = None

    def __post_init__(self) -> None:
        check_redistribution(self.redistribution)
        if self.redistribution == "none":
            self.redistribution = None

    # -- before a run -------------------------------------------------------------------------------------

    @property
    def starts_dense(self) -> bool:
        """Whether the masks of its goal are found on the way, as those of pruning are."""
        return self.target_sparsity(0.5) != 0.0 and self.initial_sparsity(0.5) == 0.0

    @property
    def moves_connections(self) -> bool:
        """Whether sites win and lose active connections to each other, as many in all."""
        return self.redistribution is not None or getattr(self, "scope", "layer") != "layer"

    def target_sparsity(self, sparsity: float) -> float:
        """The sparsity to end with when the user asks for `sparsity`."""
        return sparsity

    def initial_sparsity(self, sparsity: float) -> float:
        """The sparsity to start from when a site is to end with `sparsity`."""
        return sparsity

    def schedule(self, common: UpdateSchedule, total_steps: int) -> Schedule:
        """When the masks change; `common` is what the user's options say."""
        return common

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Called when a run is set up; raises an `FxSparseError` for an optimizer that the method cannot work with."""
        if self.redistribution == "momentum" or self.feeds_optimizer:
            check_momentum(optimizer, self.name)

    @property
    def feeds_optimizer(self) -> bool:
        """Whether the optimizer itself is to see dense gradients in every step."""
        return False

    def planned_counts(
        self, sizes: Mapping[str, int], targets: Mapping[str, int], schedule: Schedule, total_steps: int
    ) -> list[tuple[int, dict[str, int]]]:
        """From which step on how many weights of each site will be active, oldest first, as far as it can be known.

        Args:
            sizes: site -> number of its weights.
            targets: site -> number of active weights that the allocation gives it.
        """
        return [(0, dict(targets))]

    def dense_gradient_steps(self, schedule: Schedule, total_steps: int) -> int:
        """On how many of a run's steps the gradient of all weights is computed, for the FLOP ledger."""
        if self.dense_gradient is Need.ALWAYS:
            return total_steps
        return schedule.update_steps(total_steps) if self.dense_gradient is Need.UPDATES else 0

    def replaces_weight_update(self, semantics: Semantics) -> bool:
        """Whether a rewiring takes the place of the step's weight update; otherwise it comes after it."""
        choices = {
            "method": self.replaces_update,
            "gradient": self.dense_gradient is Need.UPDATES,
            "replaced": True,
            "first": False,
        }
        return self.one_shot or choices[semantics.weight_update]

    # -- rewiring -----------------------------------------------------------------------------------------

    @property
    def reads_gradient(self) -> bool:
        """Whether a rewiring looks at gradients, dense ones or those of the active weights."""
        return self.dense_gradient is not Need.NEVER or self.redistribution == "gradient"

    def new_patterns(self, sites: Sequence[Site], gradients: Sequence[Tensor | None], moment: Moment) -> list[Pattern]:
        """The new mask of every site, in their order; none at all to leave them for now.

        Args:
            gradients: of each site: dense if the method asked for it, else of the active weights. None for a method
                that reads none. Finite; of a method that is neither `one_shot` nor `moves_connections`, on a device,
                they may not be, and what comes of them is thrown away there.
        """
        quotas = self.quotas(sites, gradients, moment)
        return [
            self._drop_and_grow(site, gradient, quota, moment)
            for site, gradient, quota in zip(sites, gradients, quotas, strict=True)
        ]

    def _drop_and_grow(self, site: Site, gradient: Tensor | None, quota: Quota, moment: Moment) -> Pattern:
        mask = site.mask
        if site.groups is not None:
            return self._within_groups(site, gradient, quota, moment, site.groups)
        kept = mask & ~site.shards.select(self.drop_score(site, moment), mask, quota.drop, largest=False)
        free = ~mask if moment.semantics.regrown == "forbidden" else ~kept
        if quota.grow == 0:
            return Pattern(kept, site.active - quota.drop, kept)
        grown = site.shards.select(self.grow_score(site, gradient, moment), free, quota.grow, largest=True)
        return Pattern(kept | grown, site.active - quota.drop + quota.grow, kept)

    def _within_groups(
        self, site: Site, gradient: Tensor | None, quota: Quota, moment: Moment, groups: GroupLayout
    ) -> Pattern:
        new, kept = rewire_in_groups(
            self.drop_score(site, moment),
            lambda: self.grow_score(site, gradient, moment),
            *(site.mask, quota.drop, quota.grow, groups),
            regrows=moment.semantics.regrown != "forbidden",
        )
        return Pattern(new, site.active - quota.drop + quota.grow, kept)

    def drop_score(self, site: Site, moment: Moment) -> Tensor:
        """Of each connection (a unit tensor); the least are dropped, ties from the highest flat index on."""
        return site.magnitude()

    def grow_score(self, site: Site, gradient: Tensor | None, moment: Moment) -> Tensor:
        """Of each position (a unit tensor: see `Site.score`); the largest grow, ties from the lowest flat index on."""
        raise NotImplementedError(f"{type(self).__name__} grows and gives no grow_score")

    def quotas(self, sites: Sequence[Site], gradients: Sequence[Tensor | None], moment: Moment) -> list[Quota]:
        """How many connections to drop and grow at each site: k of both, or as `redistribution` says."""
        dropped = [moment.count(site) for site in sites]
        shares = None if self.redistribution is None else self._shares(sites, gradients, moment)
        if shares is None or not any(shares) or not all(math.isfinite(share) for share in shares):
            return [Quota(k, k) for k in dropped]  # nothing to go by, as before the optimizer's first step
        grown = redistribute(
            sum(dropped),
            shares,
            [self._room(site, k, moment) for site, k in zip(sites, dropped, strict=True)],
        )
        return [Quota(*pair) for pair in zip(dropped, grown, strict=True)]

    def momentum_of(self, site: Site, moment: Moment) -> Tensor:
        """What `redistribution="momentum"` goes by at a site: the optimizer's own momentum."""
        return site.momentum(moment.optimizer)

    @staticmethod
    def _room(site: Site, dropped: int, moment: Moment) -> int:
        free = site.size - site.active
        return free if moment.semantics.regrown == "forbidden" else free + dropped

    def _shares(self, sites: Sequence[Site], gradients: Sequence[Tensor | None], moment: Moment) -> Sequence[float]:
        """The mean magnitude over each site's active weights; one host synchronisation for all sites."""
        if self.redistribution == "momentum":
            values = [self.momentum_of(site, moment) for site in sites]
        else:
            values = [gradient for gradient in gradients if gradient is not None]
        means = [
            (site.score(value) * site.mask).sum(dtype=torch.float64) / max(site.active, 1)
            for site, value in zip(sites, values, strict=True)
        ]
        return sites[0].shards.add_up(torch.stack(means)).tolist()

    # -- what happens between rewirings -------------------------------------------------------------------

    def start_run(self, sites: Sequence[Site], seed: int) -> None:
        """Called before the first optimizer step of a run, with the weights that it starts from."""

    def observe(self, sites: Sequence[Site], gradients: Sequence[Tensor | None], step: int) -> None:
        """Called before every optimizer step with the dense gradients, if they are needed always."""

    def after_step(self, sites: Sequence[Site], moment: Moment) -> list[Pattern] | None:
        """Called after every optimizer step that moved weights; new masks, for a method that rewires all the time."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What the method remembers between steps, for exact resumption."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""

    def options(self) -> dict[str, Any]:
        """The method's options by name."""
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.init}


def check_momentum(optimizer: torch.optim.Optimizer, method: str) -> None:
    """`RuntimeStateError` if a parameter group of `optimizer` keeps no running mean of gradients."""
    for group in optimizer.param_groups:
        if not (group.get("momentum") or group.get("betas", (0.0,))[0]):
            raise RuntimeStateError(
                f"{method} reads the optimizer's momentum, and this {type(optimizer).__name__} keeps none; give it a "
                "momentum, or use Adam or AdamW"
            )
