"""How far a planned run has come, by what lies in its folder, and training it from there.

    not run -> interrupted (a configuration, perhaps checkpoints) -> finished (result.json)
                                                                  -> failed (error.json), diverged

A run that failed is tried again by the next call, from its last checkpoint; one that diverged is not, since it
would diverge again.
"""

from __future__ import annotations

import dataclasses
import json
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxsparse.core.errors import CheckpointError, ConfigError, DataError, FxSparseError
from fxsparse.studies.comparison import REFERENCES
from fxsparse.training import DivergedError, Result, TrainConfig, continue_run, train
from fxsparse.training.checkpoint import write_atomically
from fxsparse.training.config import config_options, shown
from fxsparse.training.run_folder import RunFolder

ERROR_FILE = "error.json"
NOT_RUN, INTERRUPTED, FINISHED, FAILED, DIVERGED = "not run", "interrupted", "finished", "failed", "diverged"


@dataclass(frozen=True)
class RunState:
    """One of the five words above; `result` of a finished run, `error` (one line) of one that failed, `step`
    of the last checkpoint otherwise (0 without one)."""

    word: str
    result: Result | None = None
    error: str = ""
    step: int = 0


def read_state(folder: Path, config: TrainConfig) -> RunState:
    """How far the run of `config` (resolved) in `folder` has come.

    Raises:
        ConfigError: the run that lies there was made with other options; names them with both values.
        CheckpointError: its files are damaged.
    """
    run = RunFolder(folder)
    if run.config.exists():
        changed = differences(run.read_config(), config)
        if changed:
            raise ConfigError(
                f"{folder} holds a run with {'; '.join(changed)}; change it back, remove that folder, or choose "
                "another --out"
            )
        if run.result.exists():
            try:
                return RunState(FINISHED, Result.from_json(run.result.read_text()))
            except (OSError, ValueError, TypeError) as error:
                raise CheckpointError(f"could not read {run.result}: {error}") from error
    found = run.checkpoints()
    step = int(found[-1].stem.partition("-")[2]) if found else 0
    error_file = folder / ERROR_FILE
    if error_file.exists():
        noted = json.loads(error_file.read_text())
        return RunState(noted["state"], error=noted["message"], step=step)
    return RunState(INTERRUPTED if run.config.exists() else NOT_RUN, step=step)


def differences(before: TrainConfig, now: TrainConfig) -> list[str]:
    """The options on which the result depends and that differ, as `lr 0.1 instead of 0.2`."""
    found = []
    for name, option in config_options().items():
        old, new = getattr(before, name), getattr(now, name)
        if name in REFERENCES and old is not None and new is not None:
            same = Path(old).name == Path(new).name  # a comparison may be moved, or named from another folder
        else:
            same = old == new
        if not same and not option.changeable:
            found.append(f"{name} {shown(old)} instead of {shown(new)}")
    return found


def train_there(folder: Path, config: TrainConfig, progress: bool) -> RunState:
    """Train the run, or go on with it, and say how it ended; what went wrong is noted in its folder.

    Raises:
        DataError: a data set is missing or damaged, which the other runs will find too.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when the state has been saved.
    """
    run = RunFolder(folder)
    try:
        (folder / ERROR_FILE).unlink(missing_ok=True)
        if run.config.exists() or run.checkpoints():
            free = {name: getattr(config, name) for name, option in config_options().items() if option.changeable}
            result = continue_run(folder, changes=free, progress=progress, say=_say_nothing)
        else:
            result = train(config, folder, progress=progress, say=_say_nothing)
    except DataError:
        raise
    except DivergedError as error:
        return _note(folder, DIVERGED, str(error))
    except FxSparseError as error:
        return _note(folder, FAILED, str(error))
    except Exception as error:  # out of memory, or a defect: the other runs go on
        return _note(folder, FAILED, f"{type(error).__name__}: {error}", traceback.format_exc())
    return RunState(FINISHED, result)


def note_failure(folder: Path, message: str) -> RunState:
    """Note a failure that the training process could not note itself."""
    return _note(folder, FAILED, message)


def _note(folder: Path, state: str, message: str, trace: str | None = None) -> RunState:
    line = " ".join(message.split())
    noted: dict[str, Any] = {"state": state, "message": line, **({"traceback": trace} if trace else {})}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ERROR_FILE, (json.dumps(noted, indent=2) + "\n").encode())
    except (OSError, CheckpointError):
        pass  # a full disk: the message still reaches the terminal
    return RunState(state, error=line)


def _say_nothing(line: str) -> None:
    """The progress line of the whole plan says enough."""


def with_threads(config: TrainConfig, jobs: int, cores: int) -> TrainConfig:
    """The configuration for one of `jobs` processes at a time: its share of the cores unless it names threads."""
    if jobs == 1 or config.threads is not None:
        return config
    return dataclasses.replace(config, threads=max(1, cores // jobs))
