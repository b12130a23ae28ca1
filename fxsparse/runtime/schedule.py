"""When masks change, and how much: drop-and-grow over a run, gradual pruning, and the first steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..core.errors import ConfigError, check_number, nearest

DECAYS: dict[str, Callable[[float, float], float]] = {
    "cosine": lambda progress, power: (1.0 + math.cos(math.pi * progress)) / 2.0,
    "constant": lambda progress, power: 1.0,
    "linear": lambda progress, power: 1.0 - progress,
    "inverse_power": lambda progress, power: (1.0 - progress) ** power,
}
"""Decay -> drop fraction over its initial value, by progress `t / t_end` in [0, 1] and the power."""


class Schedule(Protocol):
    """When a method changes masks. `t`, a step, is the number of optimizer steps already made."""

    def is_update_step(self, step: int) -> bool: ...

    def fraction(self, step: int) -> float: ...

    def update_steps(self, total_steps: int) -> int:
        """How many of the steps 0 ... total_steps - 1 are update steps."""
        ...


@dataclass(frozen=True)
class UpdateSchedule:
    """The paper's update schedule (section 3, "Update schedule").

    Attributes:
        interval: optimizer steps between rewirings (delta_t).
        t_end: rewiring stops before this step; need not be an integer.
        drop_fraction: fraction of the active connections dropped at the start (alpha).
        decay: `"cosine"` (the paper), `"constant"`, `"linear"`, or `"inverse_power"`: `(1 - t / t_end)^power`
            (paper, appendix on update schedules).
        decay_power: of the inverse power.
        inclusive: whether `t_end` itself is an update step.
        start: the first update step: `"after"` is step `interval`, `"on"` the one before it, `"zero"` step 0; the
            others follow every `interval` steps.
    """

    interval: int
    t_end: float
    drop_fraction: float
    decay: str = "cosine"
    decay_power: float = 3.0
    inclusive: bool = False
    start: str = "after"

    def __post_init__(self) -> None:
        check_number("update_interval", self.interval, whole=True)
        check_number("drop_fraction", self.drop_fraction)
        check_number("decay_power", self.decay_power)
        if self.interval < 1:
            raise ConfigError(f"update_interval: {self.interval} is not a positive number of steps")
        if not 0.0 <= self.drop_fraction <= 1.0:
            raise ConfigError(f"drop_fraction: {self.drop_fraction} is outside [0, 1]")
        if self.decay not in DECAYS:
            choices = ", ".join(DECAYS)
            raise ConfigError(f"decay: {self.decay!r} is not one of {choices}{nearest(self.decay, DECAYS)}")
        if self.decay_power < 0:
            raise ConfigError(f"decay_power: {self.decay_power} is below 0; the drop fraction would grow")

    @classmethod
    def for_run(
        cls,
        total_steps: int,
        *,
        update_interval: int,
        stop_fraction: float,
        drop_fraction: float,
        decay: str = "cosine",
        decay_power: float = 3.0,
        inclusive: bool = False,
        start: str = "after",
    ) -> "UpdateSchedule":
        """The schedule of a run of `total_steps` optimizer steps: `t_end = stop_fraction * total_steps`."""
        check_number("total_steps", total_steps, whole=True)
        check_number("stop_fraction", stop_fraction)
        if total_steps < 1:
            raise ConfigError(f"total_steps: {total_steps} is not a positive number of optimizer steps")
        if not 0.0 <= stop_fraction <= 1.0:
            raise ConfigError(f"stop_fraction: {stop_fraction} is outside [0, 1]")
        t_end = stop_fraction * total_steps
        return cls(update_interval, t_end, drop_fraction, decay, decay_power, inclusive, start)

    def is_update_step(self, step: int) -> bool:
        """Whether masks are rewired at optimizer step `step` (the number of steps already made)."""
        ended = step > self.t_end if self.inclusive else step >= self.t_end
        return step >= self._first and (step - self._first) % self.interval == 0 and not ended

    @property
    def _first(self) -> int:
        return {"after": self.interval, "on": self.interval - 1, "zero": 0}[self.start]

    def fraction(self, step: int) -> float:
        """The fraction of the active connections to rewire at `step`: `alpha * decay(step / t_end)`."""
        progress = step / self.t_end if self.t_end else 1.0
        return self.drop_fraction * DECAYS[self.decay](progress, self.decay_power)

    def update_steps(self, total_steps: int) -> int:
        """How many of the steps 0 ... total_steps - 1 are update steps."""
        last = min(math.floor(self.t_end) if self.inclusive else math.ceil(self.t_end) - 1, total_steps - 1)
        return max((last - self._first) // self.interval + 1, 0)


@dataclass(frozen=True)
class PruningSchedule:
    """Gradual magnitude pruning (Zhu and Gupta 2018, equation 1): a pruning every `interval` steps.

    Attributes:
        begin, end: the steps of the first and the last pruning, `begin <= end`; `end` is one whatever the interval.
        interval: optimizer steps between prunings.
    """

    begin: int
    end: int
    interval: int

    def __post_init__(self) -> None:
        for name, value in (("begin", self.begin), ("end", self.end), ("interval", self.interval)):
            check_number(f"pruning {name}", value, whole=True)
        if self.interval < 1:
            raise ConfigError(f"pruning interval: {self.interval} is not a positive number of steps")
        if not 0 <= self.begin <= self.end:
            raise ConfigError(f"pruning begins at step {self.begin} and ends at {self.end}; it takes 0 <= begin <= end")

    def is_update_step(self, step: int) -> bool:
        """Whether weights are pruned at optimizer step `step`."""
        return step == self.end or (self.begin <= step < self.end and (step - self.begin) % self.interval == 0)

    def fraction(self, step: int) -> float:
        """The sparsity to have at `step` over the final one: `1 - (1 - progress)^3`."""
        return gradual_sparsity(step, begin=self.begin, end=self.end, final=1.0)

    def update_steps(self, total_steps: int) -> int:
        """How many of the steps 0 ... total_steps - 1 are update steps."""
        last = min(self.end, total_steps) - 1  # the end itself is counted below
        inside = (last - self.begin) // self.interval + 1 if last >= self.begin else 0
        return inside + (1 if self.end < total_steps else 0)


@dataclass(frozen=True)
class FirstSteps:
    """The first `count` optimizer steps of a run; masks change at the last of them."""

    count: int

    def __post_init__(self) -> None:
        check_number("batches", self.count, whole=True)
        if self.count < 1:
            raise ConfigError(f"batches: {self.count} is not a positive number of batches")

    def is_update_step(self, step: int) -> bool:
        return step < self.count

    def fraction(self, step: int) -> float:
        return 1.0 if step == self.count - 1 else 0.0

    def update_steps(self, total_steps: int) -> int:
        return min(self.count, total_steps)


@dataclass(frozen=True)
class EveryStep:
    """Masks may change after every optimizer step; the history has a record every `interval` steps."""

    interval: int

    def is_update_step(self, step: int) -> bool:
        return False

    def fraction(self, step: int) -> float:
        return 0.0

    def update_steps(self, total_steps: int) -> int:
        return 0


def gradual_sparsity(step: int, *, begin: int, end: int, final: float, interval: int = 1) -> float:
    """Sparsity of gradual magnitude pruning at an optimizer step (Zhu and Gupta 2018, equation 1).

    It starts at 0 at step `begin`, rises with the cube of the remaining way every `interval` steps, and stays
    at `final` from step `end` on.
    """
    if step < begin:
        return 0.0
    if step >= end:
        return final
    reached = (step - begin) // interval * interval
    return final * (1.0 - (1.0 - reached / (end - begin)) ** 3)
