"""Stopping in good order: after a time, on Ctrl-C, on SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class TimeLimit:
    """Whether the time is up."""

    passed: bool = False


@contextmanager
def stopped_after(minutes: float | None) -> Iterator[TimeLimit]:
    """Within the block SIGINT and SIGTERM are a `KeyboardInterrupt`; after `minutes` (None: never) there is one.

    SIGINT even where the process began with it ignored, as what a shell runs in the background does.

    Training holds both back until its step is complete and its state saved (`fxsparse.training.interrupt`).
    Outside the main thread signals cannot be caught, and there is no limit.
    """
    limit = TimeLimit()
    if threading.current_thread() is not threading.main_thread():
        yield limit
        return

    def ring() -> None:
        limit.passed = True
        os.kill(os.getpid(), signal.SIGTERM)

    def on_signal(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    timer = threading.Timer(minutes * 60, ring) if minutes is not None else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield limit
    finally:
        if timer is not None:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
