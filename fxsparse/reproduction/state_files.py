"""The whole state of a run that has begun, in one file that another machine can go on from.

    {"name": "45k-rigl-erk-0.1-seed0", "step": 41200, ...}     one line of JSON, for people and `status`
    the run's newest checkpoint, compressed                    (weights that are 0 take almost no space)

The checkpoint holds configuration, weights, masks, optimizer, rewirer, records and random states
(`fxsparse.training.checkpoint`). At full size the file has 2 to 9 MB, 16 MB at most.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

from fxsparse.core.errors import CheckpointError
from fxsparse.training import checkpoint
from fxsparse.training.run_folder import RunFolder

FORMAT = 1
MAX_BYTES = 16 * 10**6
SUFFIX = ".state"
_LONGEST_HEAD = 4096  # bytes


@dataclass(frozen=True)
class StateHead:
    """The first line of a state file.

    Attributes:
        name: of the run.
        step: optimizer steps that are complete.
        size, sha256: of the compressed checkpoint, in bytes.
    """

    name: str
    step: int
    size: int
    sha256: str
    format: int = FORMAT


def pack(name: str, run: RunFolder, path: Path) -> StateHead | None:
    """Write the newest checkpoint of a run to the state file `path`; None if the run has none yet.

    Raises:
        CheckpointError: the disk or the folder refuses, or the file would have more than `MAX_BYTES`.
    """
    found = run.checkpoints()
    if not found:
        return None
    step = step_of(found[-1])
    if path.exists() and read_head(path).step == step:
        return read_head(path)
    try:
        body = zlib.compress(found[-1].read_bytes(), 6)
    except OSError as error:
        raise CheckpointError(f"could not read {found[-1]}: {error.strerror or error}") from error
    head = StateHead(name, step, len(body), hashlib.sha256(body).hexdigest())
    content = json.dumps(asdict(head)).encode() + b"\n" + body
    if len(content) > MAX_BYTES:
        raise CheckpointError(
            f"the state of {name} has {len(content) / 1e6:.1f} MB, and a state file at most {MAX_BYTES / 1e6:.0f}; "
            f"its checkpoint is {found[-1]}"
        )
    make_folder(path.parent)
    checkpoint.write_atomically(path, content)
    return head


def unpack(path: Path, run: RunFolder) -> StateHead:
    """Put the checkpoint of the state file `path` into a run's folder, unless a later one lies there.

    Raises:
        CheckpointError: the file is truncated, damaged or no state file, or the folder refuses.
    """
    head = read_head(path)
    found = run.checkpoints()
    if found and step_of(found[-1]) >= head.step:
        return head
    body = path.read_bytes().partition(b"\n")[2]
    if len(body) != head.size or hashlib.sha256(body).hexdigest() != head.sha256:
        raise CheckpointError(
            f"{path} is truncated or damaged ({len(body):,} of {head.size:,} bytes); bring it again, or remove it to "
            f"start {head.name} over"
        )
    target = run.path / "checkpoints" / f"step-{head.step:08d}.pt"
    make_folder(target.parent)
    checkpoint.write_atomically(target, zlib.decompress(body))
    return head


def read_head(path: Path) -> StateHead:
    """The first line of a state file; `CheckpointError` if it is none."""
    try:
        with open(path, "rb") as file:
            line = file.readline(_LONGEST_HEAD)
        head = StateHead(**json.loads(line))
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError):
        raise CheckpointError(f"{path} is no state file of a run; remove it") from None
    if head.format != FORMAT:
        raise CheckpointError(f"{path} has format {head.format}; this version reads {FORMAT}")
    return head


def step_of(checkpoint_file: Path) -> int:
    """The optimizer steps that a checkpoint's name says."""
    return int(checkpoint_file.stem.partition("-")[2])


def make_folder(folder: Path) -> None:
    """Make a folder where it is missing; `CheckpointError` if that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"could not write to {folder}: {error.strerror or error}") from error
