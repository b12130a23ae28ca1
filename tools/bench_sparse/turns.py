"""What a worker process is given, and what it gives back to be timed."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Case = dict[str, Any]


@dataclass
class Loaded:
    """A turn (wall-clock and processor seconds of what it ran), the error of its output, and facts of its own.

    A turn is one call, or for a training run that rewires, one whole cycle of steps.
    """

    turn: Callable[[], list[tuple[float, float]]]
    error: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def once(call: Callable[[], Any]) -> Callable[[], list[tuple[float, float]]]:
    def turn() -> list[tuple[float, float]]:
        start, busy = time.perf_counter(), time.process_time()
        call()
        return [(time.perf_counter() - start, time.process_time() - busy)]

    return turn
