"""Checkpoints that survive a kill, a full disk and a flipped bit.

`save` writes to a temporary file beside the target, flushes it to the disk and renames it, so that a
checkpoint's name always belongs to a complete file: the new one, or the one that was there before.
`load` gives back what `save` was given, or a `CheckpointError` that names the file.

The file is an ordinary `torch.save` archive with 40 bytes behind it: `fxsparse` and the SHA-256 of what
comes before. (`torch.load` alone does not notice a changed byte inside a tensor; it ignores the trailer.)
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fxsparse.core.errors import CheckpointError

FORMAT = 1
_MAGIC = b"fxsparse"
_TRAILER = len(_MAGIC) + hashlib.sha256().digest_size


def save(path: str | Path, payload: Mapping[str, Any]) -> None:
    """Write `payload` (tensors and plain values) to `path`, all of it or nothing.

    Raises `CheckpointError` if the disk or the folder refuses; what was at `path` is then still there.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **payload}, buffer)
    archive = buffer.getvalue()
    write_atomically(path, archive + _MAGIC + hashlib.sha256(archive).digest())


def load(path: str | Path) -> dict[str, Any]:
    """The payload saved at `path`, its tensors on the CPU.

    Raises `CheckpointError`, naming the file, if it is missing, truncated, damaged, or something else.
    Nothing in the file is executed (`weights_only`).
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror}") from None
    archive, trailer = content[:-_TRAILER], content[-_TRAILER:]
    if trailer != _MAGIC + hashlib.sha256(archive).digest():
        raise CheckpointError(f"{path} is not a complete fxsparse checkpoint: it is damaged, truncated or foreign")
    try:
        payload = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch.load raises on a file that another version wrote
        raise CheckpointError(f"could not read {path}: {str(error).splitlines()[0]}") from error
    if payload.get("format") != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {payload.get('format')}; this version reads {FORMAT}")
    return payload


def write_atomically(path: str | Path, content: bytes) -> None:
    """Replace the file at `path` by `content`: to a temporary file, to the disk, then renamed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CheckpointError(f"could not write {path}: {error.strerror or error}") from error


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut, where the system lets a folder be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems refuse to sync a folder; the file itself is safe
    finally:
        os.close(descriptor)
