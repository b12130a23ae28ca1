"""The small JSON that a run leaves: what it was, on what it ran, and how it came out. Nothing in it is typed in.

A run that diverged leaves one too, with its reason: it would diverge again, so it counts as done.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxsparse.core.errors import ConfigError
from fxsparse.reproduction.queue import QueuedRun
from fxsparse.studies.run_state import DIVERGED, FINISHED, RunState, differences
from fxsparse.training import Result, TrainConfig
from fxsparse.training.checkpoint import write_atomically
from fxsparse.training.metrics import read_metrics
from fxsparse.training.run_folder import RunFolder

FORMAT = 1
KIND = "reproduction run"
_PLACES = ("data_root",)  # of a machine, not of a run


@dataclass(frozen=True)
class FinishedRun:
    """What lies in a result file.

    Attributes:
        name: of the run and of its file.
        state: "finished", or "diverged" with the `reason`.
        config: every option of the run.
        result: of a finished run.
        curve: `[step, loss, accuracy]` of each evaluation on the watched split.
        at_a_time: runs that shared the device, for the seconds.
        stopped_at: the last step that is known of a run that diverged.
    """

    name: str
    state: str
    config: TrainConfig
    seed: int
    result: Result | None
    curve: Sequence[Sequence[float]]
    reason: str = ""
    at_a_time: int = 1
    stopped_at: int | None = None

    @property
    def accuracy(self) -> float:
        """Percent of the test images, at the end."""
        assert self.result is not None
        return 100 * self.result.test_accuracy


def write_result(folder: Path, run: QueuedRun, state: RunState, run_folder: RunFolder, at_a_time: int) -> Path:
    """Write the result file of a run that has finished or diverged; `CheckpointError` if that cannot be done."""
    records = read_metrics(run_folder.metrics) if run_folder.metrics.exists() else []
    evaluations = [record for record in records if record["kind"] == "eval"]
    trained = run_folder.read_config()
    watched = "validation" if trained.validation else "test"
    config = {name: value for name, value in dataclasses.asdict(trained).items() if name not in _PLACES}
    content: dict[str, Any] = {
        "kind": KIND,
        "format": FORMAT,
        "name": run.name,
        "state": state.word,
        "method": run.place.row.label,
        "density": run.place.density,
        "seed": run.seed,
        "at_a_time": at_a_time,
    }
    if state.result is not None:
        result = dataclasses.asdict(state.result)
        del result["run_folder"]
        content |= {"device": result["device"], "versions": result["versions"], "result": result}
    else:
        content |= {"reason": _without_paths(state.error), "stopped_at": records[-1]["step"] if records else 0}
    content |= {
        "curve": [[r["step"], r["loss"], r["accuracy"]] for r in evaluations if r["split"] == watched],
        "config": config,
    }
    path = folder / f"{run.name}.json"
    write_atomically(path, (_to_json(content) + "\n").encode())
    return path


def _without_paths(message: str) -> str:
    """What diverged, without the advice and the checkpoint's place on this machine."""
    return message.partition(";")[0]


def _to_json(content: Mapping[str, Any]) -> str:
    """JSON with a line a key, so that a curve of fifty points is one line."""
    lines = []
    for key, value in content.items():
        if isinstance(value, dict):
            inner = ",\n".join(f"    {json.dumps(name)}: {json.dumps(each)}" for name, each in value.items())
            lines.append(f"  {json.dumps(key)}: {{\n{inner}\n  }}")
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}"


def read_result(path: Path) -> FinishedRun:
    """The result in a file; `ConfigError` in one line if it holds none."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"could not read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error})") from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ConfigError(f"{path} is no result of a run")
    if content.get("format") != FORMAT:
        raise ConfigError(f"{path} has format {content.get('format')}; this version reads {FORMAT}")
    try:
        if content["state"] not in (FINISHED, DIVERGED):
            raise ConfigError(f"{path}: state is {content['state']!r}")
        if content["name"] != path.stem:
            raise ConfigError(f"{path} holds the result of {content['name']}; give it that name")
        finished = content["state"] == FINISHED
        return FinishedRun(
            name=content["name"],
            state=content["state"],
            config=TrainConfig.from_dict(content["config"]),
            seed=content["seed"],
            result=Result(run_folder=content["name"], **content["result"]) if finished else None,
            curve=content["curve"],
            reason=content.get("reason", ""),
            at_a_time=content["at_a_time"],
            stopped_at=content.get("stopped_at"),
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {type(error).__name__} {error}") from None


@dataclass(frozen=True)
class Found:
    """The results in a folder, by name, and a line for every file that was left out."""

    runs: Mapping[str, FinishedRun]
    complaints: Sequence[str]


def read_results(folder: Path, others: Sequence[str] = ()) -> Found:
    """All results in a folder. What is none of ours is left out with a line; `others` are the kinds that are not."""
    runs, complaints = {}, []
    for path in sorted(folder.glob("*.json")):
        try:
            if kind_of(path) not in others:
                runs[path.stem] = read_result(path)
        except ConfigError as error:
            complaints.append(f"{error}; left out")
    return Found(runs, complaints)


def kind_of(path: Path) -> str | None:
    """What a JSON file says that it is; None if it does not."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content.get("kind") if isinstance(content, dict) else None


def result_of(run: QueuedRun, found: Found) -> FinishedRun | None:
    """The result of a queued run, if it has one.

    Raises:
        ConfigError: it was made with other options than the queue has now; names them with both values.
    """
    done = found.runs.get(run.name)
    if done is None:
        return None
    changed = differences(done.config, run.config)
    if changed:
        raise ConfigError(
            f"the result {run.name}.json was made with {'; '.join(changed)}; move it away to run it again, or give the "
            "options that it was made with"
        )
    return done
