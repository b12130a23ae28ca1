"""Ctrl-C and SIGTERM, held back until the step in progress is complete."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class TrainingInterrupted(KeyboardInterrupt):
    """Training stopped on request, after its state was saved to `checkpoint` at optimizer step `step`."""

    def __init__(self, step: int, checkpoint: Path, run_folder: Path):
        super().__init__(
            f"interrupted after step {step}; continue with: fxsparse train --resume {run_folder}",
        )
        self.step, self.checkpoint, self.run_folder = step, checkpoint, run_folder


class StopRequest:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self.made = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within the block, the first SIGINT or SIGTERM only sets `made`; a second one interrupts at once.

    Outside the main thread signals cannot be caught; they then do what they did before.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def on_signal(number: int, frame: object) -> None:
        if request.made:
            raise KeyboardInterrupt
        request.made = True

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
