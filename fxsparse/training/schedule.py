"""The learning rate as a pure function of the step, so that a checkpoint needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Sequence


def learning_rate(
    step: int,
    total_steps: int,
    *,
    base: float,
    schedule: str,
    milestones: Sequence[float] = (),
    gamma: float = 0.2,
    warmup_steps: int = 0,
) -> float:
    """The rate for optimizer step `step` (counted from 0) of `total_steps`.

    `"constant"` is `base`; `"step"` multiplies it by `gamma` at every milestone passed, a milestone below 1
    being a share of the run and any other a step; `"cosine"` falls from `base` to 0 over the steps after the
    warm-up. During the first `warmup_steps` the rate rises linearly to what the schedule gives.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if schedule == "constant":
        return warmup * base
    if schedule == "step":
        passed = sum(step >= milestone_step(milestone, total_steps) for milestone in milestones)
        return warmup * base * gamma**passed
    if schedule == "cosine":
        done = max(0, step - warmup_steps) / max(1, total_steps - warmup_steps)
        return warmup * base * 0.5 * (1 + math.cos(math.pi * done))
    raise ValueError(schedule)


def milestone_step(milestone: float, total_steps: int) -> int:
    """The step at which a milestone is passed: a share of the run if it is below 1, else itself."""
    return round(milestone * total_steps) if milestone < 1 else int(milestone)
