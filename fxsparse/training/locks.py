"""Locks that a process holds until it ends, however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxsparse.core.errors import ConfigError

try:
    import fcntl
except ImportError:  # no such module on Windows; there, two processes on one folder go unnoticed
    fcntl = None  # type: ignore[assignment]


@contextmanager
def held(path: str | Path, wait: bool = False) -> Iterator[bool]:
    """Whether the file at `path` (made where it is missing) is this process's within the block.

    False where another process holds it; with `wait`, wait for it. A file system without locks gives it to all.

    Raises:
        ConfigError: the file or its folder cannot be made.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise ConfigError(f"could not write to {path.parent}: {error.strerror or error}") from error
    try:
        yield _lock(descriptor, wait)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
