"""The folder of one run: what lies where, whose it is, and what a resumed run starts from.

config.json     every option, resolved          metrics.jsonl   the records that are compared
kept/           weights of steps kept for good
checkpoints/    step-00000400.pt, ...           timing.jsonl    seconds
result.json     when the run has finished       tensorboard/, plot.png   where they can be made
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxsparse.core.errors import CheckpointError, ConfigError
from fxsparse.training import checkpoint
from fxsparse.training.config import TrainConfig
from fxsparse.training.locks import held


class RunFolder:
    """A run folder at `path`, whether or not it is there yet."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.result = self.path / "result.json"
        self.plot = self.path / "plot.png"
        self.tensorboard = self.path / "tensorboard"
        self._checkpoints = self.path / "checkpoints"
        self._kept = self.path / "kept"

    def require_new(self) -> None:
        """`ConfigError` if a run lies here already."""
        if self.config.exists() or self.metrics.exists() or self.checkpoints():
            raise ConfigError(
                f"{self.path} already holds a run; continue it with --resume {self.path}, or choose another --out"
            )

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the folder and keep it for this process; `ConfigError` if that cannot be done."""
        try:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            self._kept.mkdir(exist_ok=True)
            for place in (self.path, self._checkpoints, self._kept):
                for leftover in place.glob(".*.tmp"):
                    leftover.unlink()
        except OSError as error:
            raise ConfigError(f"could not write to the run folder {self.path}: {error.strerror}") from error
        with held(self.path / ".lock") as ours:
            if not ours:
                raise ConfigError(f"another process is training in {self.path}")
            yield

    def read_config(self) -> TrainConfig:
        """What `config.json` says; `CheckpointError` if it cannot be read."""
        try:
            return TrainConfig.from_json(self.config.read_text())
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            raise CheckpointError(f"could not read {self.config}: {error}") from error

    def checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(self._checkpoints.glob("step-*.pt"))

    def keep(self, step: int, payload: dict[str, Any]) -> None:
        """Save what was there after `step` steps for good; `payload` has the model's state dict under `model`."""
        checkpoint.save(self._kept / f"step-{step:08d}.pt", payload)

    def saved_steps(self) -> list[int]:
        """The steps of which weights are there, kept or in a checkpoint."""
        found = [*self._kept.glob("step-*.pt"), *self.checkpoints()]
        return sorted({int(path.stem.removeprefix("step-")) for path in found})

    def saved(self, step: int) -> Path | None:
        """The file with the weights after `step` steps, if there is one."""
        name = f"step-{step:08d}.pt"
        return next((place / name for place in (self._kept, self._checkpoints) if (place / name).exists()), None)

    def save_checkpoint(self, step: int, payload: dict[str, Any], keep: int) -> Path:
        """Save a checkpoint after `step` steps, then remove all but the newest `keep` (0 keeps all).

        Checkpoints of later steps, left by a run that was resumed from an earlier one, count as older.
        """
        path = self._checkpoints / f"step-{step:08d}.pt"
        checkpoint.save(path, payload)
        earlier = [other for other in self.checkpoints() if other < path]
        later = [other for other in self.checkpoints() if other > path]
        for other in later + (earlier[: max(0, len(earlier) + 1 - keep)] if keep else []):
            with contextlib.suppress(OSError):
                other.unlink()
        return path


@dataclass(frozen=True)
class ResumePoint:
    """Where a resumed run starts: its folder, its configuration, and its checkpoint if it had one yet."""

    folder: RunFolder
    config: TrainConfig
    payload: dict[str, Any] | None


def find_resume_point(path: str | Path, out: str | Path | None = None) -> ResumePoint:
    """What `--resume PATH` means: a run folder (its newest checkpoint) or one checkpoint file.

    A checkpoint holds all of a run's state, so that it can be carried to another machine; outside a run
    folder it needs `out`, the folder to go on in. Raises `CheckpointError` or `ConfigError`.
    """
    path, folder, payload = Path(path), None, None
    if path.is_dir():
        folder = RunFolder(path)
        found = folder.checkpoints()
        if found:
            payload = checkpoint.load(found[-1])
        elif not folder.config.exists():
            raise CheckpointError(f"{path} holds no run")
    else:
        payload = checkpoint.load(path)
        if path.absolute().parent.name == "checkpoints":
            folder = RunFolder(path.absolute().parent.parent)
    # a run killed before its first checkpoint starts over
    config = TrainConfig.from_json(payload["config"]) if payload else RunFolder(path).read_config()
    if out is not None and (folder is None or Path(out).resolve() != folder.path.resolve()):
        folder = RunFolder(out)
        folder.require_new()
    if folder is None:
        raise ConfigError(f"{path} lies outside a run folder; say with --out where to go on")
    return ResumePoint(folder, config, payload)
