"""When connections are rewired, and how many of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..core.errors import ConfigError, check_number, nearest

DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2.0,
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
}
"""Decay -> drop fraction over its initial value, by progress `t / t_end` in [0, 1)."""


@dataclass(frozen=True)
class UpdateSchedule:
    """The paper's update schedule (section 3, "Update schedule").

    Attributes:
        interval: optimizer steps between rewirings (delta_t).
        t_end: rewiring stops before this step; need not be an integer.
        drop_fraction: fraction of the active connections dropped at the start (alpha).
        decay: `"cosine"` (the paper), `"constant"` or `"linear"`.
    """

    interval: int
    t_end: float
    drop_fraction: float
    decay: str = "cosine"

    def __post_init__(self) -> None:
        check_number("update_interval", self.interval, whole=True)
        check_number("drop_fraction", self.drop_fraction)
        if self.interval < 1:
            raise ConfigError(f"update_interval: {self.interval} is not a positive number of steps")
        if not 0.0 <= self.drop_fraction <= 1.0:
            raise ConfigError(f"drop_fraction: {self.drop_fraction} is outside [0, 1]")
        if self.decay not in DECAYS:
            choices = ", ".join(DECAYS)
            raise ConfigError(f"decay: {self.decay!r} is not one of {choices}{nearest(self.decay, DECAYS)}")

    @classmethod
    def for_run(
        cls, total_steps: int, *, update_interval: int, stop_fraction: float, drop_fraction: float, decay: str
    ) -> "UpdateSchedule":
        """The schedule of a run of `total_steps` optimizer steps: `t_end = stop_fraction * total_steps`."""
        check_number("total_steps", total_steps, whole=True)
        check_number("stop_fraction", stop_fraction)
        if total_steps < 1:
            raise ConfigError(f"total_steps: {total_steps} is not a positive number of optimizer steps")
        if not 0.0 <= stop_fraction <= 1.0:
            raise ConfigError(f"stop_fraction: {stop_fraction} is outside [0, 1]")
        return cls(update_interval, stop_fraction * total_steps, drop_fraction, decay)

    def is_update_step(self, step: int) -> bool:
        """Whether masks are rewired at optimizer step `step` (the number of steps already made)."""
        return step > 0 and step % self.interval == 0 and step < self.t_end

    def fraction(self, step: int) -> float:
        """The fraction of the active connections to rewire at `step`: `alpha * decay(step / t_end)`."""
        return self.drop_fraction * DECAYS[self.decay](step / self.t_end)

    def update_steps(self, total_steps: int) -> int:
        """How many of the steps 0 ... total_steps - 1 are update steps."""
        last = min(math.ceil(self.t_end), total_steps) - 1
        return max(last // self.interval, 0)
