"""Warnings that a run gives once, however often their cause comes back."""

import warnings

from ..core.errors import FxSparseWarning


class WarnOnce:
    """Gives an `FxSparseWarning` the first time; messages that differ behind a colon or in a step are of one kind."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def __call__(self, message: str) -> None:
        kind = message.split(":")[0].split(" at step")[0]
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, FxSparseWarning, stacklevel=2)
