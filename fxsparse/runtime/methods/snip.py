"""SNIP, "Single-shot network pruning based on connection sensitivity" (Lee et al. 2019).

The masks come from the first batches of the run itself: the model starts dense, in its first `batches` optimizer
steps no weight moves, and at the last of them the connections with the largest `|w * grad|` are kept. From then on
it is static. FLOP ledger of a training step: `3 f_s` (and `3 f_d` for those first steps).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.errors import ConfigError
from ..group_selection import keep_in_groups
from ..schedule import FirstSteps, Schedule, UpdateSchedule
from ..selection import select
from ..sites import Site
from .base import Method, Moment, Need, Pattern
from .pruning import check_scope, patterns_across


@dataclass(kw_only=True, eq=False)
class SNIP(Method):
    """One-shot masks by connection sensitivity, then static.

    Attributes:
        batches: how many batches' gradients are averaged.
        scope: `"layer"` keeps each site's number of the distribution; `"global"` the same total, whatever the site.
    """

    name = "snip"
    summary = "keeps the largest |weight * gradient| of the first batches, then static"
    dense_gradient = Need.UPDATES
    rewires = True
    one_shot = True
    granularities: ClassVar[tuple[str, ...]] = ("weight", "block", "n:m")

    batches: int = 1
    scope: str = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scope(self.scope)
        FirstSteps(self.batches)
        if self.redistribution is not None:
            raise ConfigError("redistribution: snip grows nothing; leave it out, or choose scope='global'")
        self._sums: dict[str, Tensor] = {}

    def initial_sparsity(self, sparsity: float) -> float:
        return 0.0

    def schedule(self, common: UpdateSchedule, total_steps: int) -> Schedule:
        if self.batches > total_steps:
            raise ConfigError(f"batches: {self.batches} is more than the {total_steps} optimizer steps of the run")
        return FirstSteps(self.batches)

    def planned_counts(
        self, sizes: Mapping[str, int], targets: Mapping[str, int], schedule: Schedule, total_steps: int
    ) -> list[tuple[int, dict[str, int]]]:
        return [(0, dict(sizes)), (self.batches, dict(targets))]

    def dense_gradient_steps(self, schedule: Schedule, total_steps: int) -> int:
        return 0  # while the gradients are dense so are the masks, and the ledger has those steps as dense ones

    @torch.no_grad()
    def new_patterns(self, sites: Sequence[Site], gradients: Sequence[Tensor | None], moment: Moment) -> list[Pattern]:
        for site, gradient in zip(sites, gradients, strict=True):
            assert gradient is not None, "the runtime skips sites without a gradient"
            self._sums[site.name] = self._sums.get(site.name, torch.zeros_like(gradient)).to(gradient.device) + gradient
        if moment.fraction == 0.0:  # more batches are to come
            return []
        scores = [site.sensitivity(self._sums.pop(site.name)) for site in sites]
        if self.scope == "global":
            return patterns_across(sites, scores, sum(site.target for site in sites))
        masks = [_strongest(site, score) for site, score in zip(sites, scores, strict=True)]
        return [Pattern(mask, site.target, mask) for site, mask in zip(sites, masks, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self._sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums = {name: total.clone() for name, total in state["sums"].items()}


def _strongest(site: Site, score: Tensor) -> Tensor:
    """The new mask: the site's number of active units of largest score, or the N of every group."""
    if site.groups is None:
        return select(score, site.mask, site.target, largest=True)
    return keep_in_groups(score, site.mask, site.active - site.target, site.groups, 0)
