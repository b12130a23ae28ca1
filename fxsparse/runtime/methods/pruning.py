"""Gradual magnitude pruning (Zhu and Gupta 2018, "To prune, or not to prune").

Starts dense; every `interval` steps the smallest weights go, along a cubic schedule. FLOP ledger of a training step:
`3 E[f_s]` over the run's densities.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar

import torch
from torch import Tensor

from ...core.errors import ConfigError, check_number
from ...core.masking import floor_count
from ..schedule import PruningSchedule, Schedule, UpdateSchedule
from ..sites import Site
from ..update_rules import select_across
from .base import Method, Moment, Pattern, Quota

BEGIN, END = 700 / 87_890, 65_918 / 87_890
"""The report's first and last pruning step over the length of its run: 250 epochs of 45,000 images, 128 a step."""


@dataclass(kw_only=True, eq=False)
class Pruning(Method):
    """From dense to the target sparsities by magnitude.

    Attributes:
        scope: `"layer"` gives each site its sparsity of the distribution; `"global"` takes the smallest of all
            weights, whatever their site, to the same overall sparsity.
        begin, end: first and last pruning step; below 1 (or None, the report's) they are shares of the run.
        interval: optimizer steps between prunings; None takes the run's update interval.
    """

    name = "pruning"
    summary = "starts dense, drops the smallest weights along a cubic schedule"
    rewires = True
    replaces_update = False
    granularities: ClassVar[tuple[str, ...]] = ("weight", "channel", "block", "n:m")
    over_shards: ClassVar[bool] = True
    step_options = ("begin", "end")

    scope: str = "layer"
    begin: float | None = None
    end: float | None = None
    interval: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scope(self.scope)
        if self.redistribution is not None:
            raise ConfigError("redistribution: pruning grows nothing; leave it out, or choose scope='global'")
        for name in ("begin", "end"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value)
                if value < 0 or (value >= 1 and not isinstance(value, Integral)):
                    raise ConfigError(
                        f"{name}: {value!r} is neither a whole number of steps nor a share of the run, in [0, 1)"
                    )
        if isinstance(self.begin, Integral) and isinstance(self.end, Integral):
            PruningSchedule(int(self.begin), int(self.end), 1)
        if self.interval is not None:
            PruningSchedule(0, 0, self.interval)

    def initial_sparsity(self, sparsity: float) -> float:
        return 0.0

    def schedule(self, common: UpdateSchedule, total_steps: int) -> Schedule:
        def step(value: float | None, share: float) -> int:
            value = share if value is None else value
            return min(round(value * total_steps), total_steps - 1) if value < 1 else int(value)

        interval = common.interval if self.interval is None else self.interval
        schedule = PruningSchedule(step(self.begin, BEGIN), step(self.end, END), interval)
        if schedule.end >= total_steps:
            raise ConfigError(
                f"pruning ends at step {schedule.end}, and the run has {total_steps} steps; "
                "it would not reach its sparsity"
            )
        return schedule

    def planned_counts(
        self, sizes: Mapping[str, int], targets: Mapping[str, int], schedule: Schedule, total_steps: int
    ) -> list[tuple[int, dict[str, int]]]:
        """Exact for scope `"layer"`; for `"global"` as if each layer were pruned to its own target."""
        steps = [step for step in range(total_steps) if schedule.is_update_step(step)]
        planned = [(0, dict(sizes))]
        for step in steps:
            reached = {name: _kept(sizes[name], targets[name], schedule.fraction(step)) for name in sizes}
            planned.append((step + 1, reached))
        return planned

    def new_patterns(self, sites: Sequence[Site], gradients: Sequence[Tensor | None], moment: Moment) -> list[Pattern]:
        if self.scope == "layer":
            return super().new_patterns(sites, gradients, moment)
        wanted = _kept(sum(s.size for s in sites), sum(s.target for s in sites), moment.fraction)
        scores = [self.drop_score(site, moment) for site in sites]
        return patterns_across(sites, scores, min(wanted, sum(site.active for site in sites)))

    def quotas(self, sites: Sequence[Site], gradients: Sequence[Tensor | None], moment: Moment) -> list[Quota]:
        kept = [_kept(site.size, site.target, moment.fraction) for site in sites]
        return [Quota(max(site.active - k, 0), 0) for site, k in zip(sites, kept, strict=True)]


def _kept(size: int, target: int, fraction: float) -> int:
    """Weights that are left when `fraction` of the way from `size` down to `target` is gone."""
    return size - floor_count(fraction, size - target)


@torch.no_grad()
def patterns_across(sites: Sequence[Site], scores: Sequence[Tensor], count: int) -> list[Pattern]:
    """The patterns that keep the `count` active weights of largest score over all sites."""
    masks = select_across(scores, [site.mask for site in sites], count)
    active = torch.stack([mask.sum() for mask in masks]).tolist()
    return [Pattern(mask, number, mask) for mask, number in zip(masks, active, strict=True)]


def check_scope(scope: str) -> None:
    """`ConfigError` unless `scope` is `"layer"` or `"global"`."""
    if scope not in ("layer", "global"):
        raise ConfigError(f"scope: {scope!r} is not one of layer, global")
