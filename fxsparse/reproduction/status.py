"""How far the queue is: what is done, what has begun, and what the rest will take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tabulate import tabulate

from fxsparse.core.errors import CheckpointError
from fxsparse.reproduction.measure import read_jobs, read_seconds
from fxsparse.reproduction.queue import TIMED_AS, QueuedRun
from fxsparse.reproduction.results import Found, result_of
from fxsparse.reproduction.slices import Workplace, recorded
from fxsparse.reproduction.state_files import read_head
from fxsparse.studies.run_state import DIVERGED, ERROR_FILE, FAILED, FINISHED, NOT_RUN

IN_PROGRESS = "in progress"


@dataclass(frozen=True)
class RunStatus:
    """How far one run is.

    Attributes:
        word: "finished", "diverged", "failed", "in progress" or "not run".
        step: optimizer steps that are complete.
        seconds: of a step, measured on this device; None where none was.
        note: the accuracy, or what went wrong.
    """

    run: QueuedRun
    word: str
    step: int
    seconds: float | None
    note: str = ""

    @property
    def seconds_left(self) -> float | None:
        """What is left of the run; None where the seconds of a step are not known."""
        if self.word in (FINISHED, DIVERGED):
            return 0.0
        return None if self.seconds is None else (self.run.steps - self.step) * self.seconds


def read_status(queue: Sequence[QueuedRun], place: Workplace, device: str, scaled: bool = False) -> list[RunStatus]:
    """How far each run of the queue is; seconds are those of `device`."""
    found = place.found()
    seconds = _seconds_of_methods(queue, found, place, device, scaled)
    return [_status_of(run, found, place, seconds, device) for run in queue]


def _status_of(run: QueuedRun, found: Found, place: Workplace, seconds: Mapping[str, float], device: str) -> RunStatus:
    done = result_of(run, found)
    label = run.place.row.label
    usual = seconds.get(label, seconds.get(TIMED_AS.get(label, label)))
    if done is not None and done.result is not None:
        seconds_here = done.result.seconds / done.result.steps
        return RunStatus(run, FINISHED, run.steps, seconds_here, f"{done.accuracy:.2f}% on {done.result.device}")
    if done is not None:
        return RunStatus(run, DIVERGED, done.stopped_at or 0, usual, done.reason)
    folder = place.run_folder(run)
    step, own = recorded(folder)
    if place.state_file(run).exists():
        try:
            step = max(step, read_head(place.state_file(run)).step)
        except CheckpointError as error:
            return RunStatus(run, FAILED, step, own or usual, str(error))
    noted = folder.path / ERROR_FILE
    if noted.exists():
        return RunStatus(run, FAILED, step, own or usual, json.loads(noted.read_text())["message"])
    return RunStatus(run, IN_PROGRESS if step else NOT_RUN, step, own or usual)


def _seconds_of_methods(
    queue: Sequence[QueuedRun], found: Found, place: Workplace, device: str, scaled: bool
) -> dict[str, float]:
    """Method -> seconds of a step on this device: of finished runs, else of runs in progress, else as measured alone.

    Those of runs are wall-clock seconds beside as many others as there were.
    """
    names = {run.name: run.place.row.label for run in queue}
    seen: dict[str, list[float]] = {}
    if not scaled:
        for row in read_seconds(place.results).get(device, []):
            seen[row.method] = [row.mean]
    begun: dict[str, list[float]] = {}
    for run in queue:
        _, own = recorded(place.run_folder(run))
        if own is not None and run.name not in found.runs:
            begun.setdefault(run.place.row.label, []).append(own)
    finished: dict[str, list[float]] = {}
    for name, done in found.runs.items():
        if name in names and done.result is not None and done.result.device == device:
            finished.setdefault(names[name], []).append(done.result.seconds / done.result.steps)
    return {label: median(values) for label, values in (seen | begun | finished).items()}


def listed(status: Sequence[RunStatus], place: Workplace, device: str) -> str:
    """The queue as a table, and below it what is done and what the rest will take."""
    rows = [
        [
            index,
            each.run.name,
            each.word,
            f"{each.step:,} of {each.run.steps:,}" if each.step else f"{each.run.steps:,}",
            "" if each.seconds is None else f"{each.seconds:.4f}",
            _duration(each.seconds_left) if each.seconds_left else "",
            each.note,
        ]
        for index, each in enumerate(status, 1)
    ]
    headers = ["", "run", "state", "steps", "s a step", "left", ""]
    table = tabulate(rows, headers, tablefmt="simple", disable_numparse=True)
    return f"{table}\n\n{summary(status, place, device)}"


def summary(status: Sequence[RunStatus], place: Workplace, device: str) -> str:
    """What is done, what has begun, and what the rest will take on this device."""
    words = [each.word for each in status]
    counts = [
        f"{words.count(word)} {word}"
        for word in (FINISHED, DIVERGED, FAILED, IN_PROGRESS, NOT_RUN)
        if words.count(word) or word in (FINISHED, NOT_RUN)
    ]
    lines = [f"{len(status)} runs: {', '.join(counts)}"]
    left = [each.seconds_left for each in status]
    known = sum(seconds for seconds in left if seconds is not None)
    unknown = sorted({each.run.place.row.label for each in status if each.seconds_left is None})
    if known:
        jobs = read_jobs(place.results).get(device, (1, []))[0]
        at_a_time = f"; with {jobs} at a time about {_duration(known / jobs)}" if jobs > 1 else ""
        lines.append(f"left on {device}: about {_duration(known)} of runs, one after the other{at_a_time}")
    if unknown:
        lines.append(f"not known on {device}: the seconds of {', '.join(unknown)}; measure them with reproduce.py time")
    return "\n".join(lines)


def _duration(seconds: float | None) -> str:
    """`2.1 days`, `4 h`, `12 min`, `40 s`."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{hours} h" if hours < 48 else f"{hours / 24:.1f} days"
