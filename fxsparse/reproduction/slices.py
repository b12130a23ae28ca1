"""A slice: so many minutes of the queue, with everything saved at its end.

    OUT/RUN/            the run's folder while it is at work (`fxsparse train`)
    OUT/states/RUN.state    what a run that is not done goes on from, here or on another machine
    RESULTS/RUN.json    what a run that is done leaves

To go on elsewhere, take `OUT/states` and RESULTS along.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fxsparse.core.errors import CheckpointError, ConfigError
from fxsparse.reproduction.measure import KINDS
from fxsparse.reproduction.queue import QueuedRun
from fxsparse.reproduction.results import Found, read_results, result_of, write_result
from fxsparse.reproduction.state_files import MAX_BYTES, SUFFIX, make_folder, pack, step_of, unpack
from fxsparse.studies.execution import execute
from fxsparse.studies.plan import PlannedRun
from fxsparse.studies.run_state import DIVERGED, FAILED, FINISHED, RunState, differences, read_state
from fxsparse.training import TrainConfig, checkpoint
from fxsparse.training.checkpoint import write_atomically
from fxsparse.training.locks import held
from fxsparse.training.metrics import read_metrics
from fxsparse.training.run_folder import RunFolder

TOLD_EVERY = 120.0  # seconds between lines on runs that have no progress bar


@dataclass(frozen=True)
class Workplace:
    """Where runs work, and where their results go."""

    out: Path
    results: Path

    @property
    def states(self) -> Path:
        """The folder of state files."""
        return self.out / "states"

    def state_file(self, run: QueuedRun) -> Path:
        return self.states / f"{run.name}{SUFFIX}"

    def run_folder(self, run: QueuedRun) -> RunFolder:
        return RunFolder(self.out / run.name)

    def found(self) -> Found:
        """The results that are there, with a line for each file among them that is none."""
        return read_results(self.results, KINDS)


def work(
    queue: Sequence[QueuedRun],
    place: Workplace,
    *,
    jobs: int = 1,
    minutes: float | None = None,
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> bool:
    """Do what is left of the queue for `minutes` (None: to its end); whether nothing is left to try.

    Args:
        jobs: runs at a time.
        progress: a bar on stderr for the run in progress, where there is one at a time.
        say: takes a line for each run, and for what else there is to tell.

    Raises:
        ConfigError: another process is at work there; a result or a run there was made with other options.
        CheckpointError: a state file is damaged; nothing can be written.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with everything saved.
    """
    with held(place.out / ".lock") as is_ours:
        if not is_ours:
            raise ConfigError(f"another process is at work in {place.out}; wait for it, or choose another --out")
        check_room(place)
        found = place.found()
        for line in found.complaints:
            say(line)
        _collect(queue, place, jobs)
        found = place.found()
        left = [run for run in queue if result_of(run, found) is None]
        by_folder = {}
        for run in left:
            by_folder[place.out / run.name] = run
            if place.state_file(run).exists():
                say(f"{run.name}: goes on from step {_bring(run, place):,} of {run.steps:,}")

        def closed(planned: PlannedRun, state: RunState) -> None:
            _close(by_folder[planned.folder], state, place, jobs)

        try:
            planned = [run.planned(place.out) for run in left]
            bar = progress and jobs == 1
            with _told_now_and_then(left, place, say, TOLD_EVERY) if not bar else contextlib.nullcontext():
                return execute(planned, jobs=jobs, limit_minutes=minutes, progress=bar, say=say, closed=closed)
        finally:
            _save(left, place)


def _bring(run: QueuedRun, place: Workplace) -> int:
    """Unpack a run's state file; the step it goes on from. `ConfigError` if it is the state of another run."""
    path, folder = place.state_file(run), place.run_folder(run)
    head = unpack(path, folder)
    if not folder.config.exists():  # it came from elsewhere; a configuration that lies there is compared before it runs
        state = checkpoint.load(folder.checkpoints()[-1])
        changed = differences(TrainConfig.from_json(state["config"]), run.config)
        if changed:
            folder.checkpoints()[-1].unlink()
            raise ConfigError(f"{path} is the state of a run with {'; '.join(changed)}; remove it to start over")
    return max(head.step, step_of(folder.checkpoints()[-1]))


def recorded(folder: RunFolder) -> tuple[int, float | None]:
    """The last step that is recorded in a run's folder, and the seconds of a step there; None without a record."""
    timing = folder.path / "timing.jsonl"
    found = folder.checkpoints()
    step = step_of(found[-1]) if found else 0
    records = read_metrics(timing) if timing.exists() else []
    if not records:
        return step, None
    first, last = records[0], records[-1]
    if len(records) == 1:
        return max(step, last["step"]), last["seconds"] / last["step"]
    # from the first record on: what lies before it may have been made on another machine
    return max(step, last["step"]), (last["seconds"] - first["seconds"]) / max(1, last["step"] - first["step"])


@contextlib.contextmanager
def _told_now_and_then(
    queue: Sequence[QueuedRun], place: Workplace, say: Callable[[str], None], seconds: float
) -> Iterator[None]:
    """Within the block, a line every so many seconds says how far the runs at work are."""
    ended = threading.Event()

    def steps() -> dict[str, int]:
        return {run.name: recorded(place.run_folder(run))[0] for run in queue}

    def tell(before: dict[str, int]) -> None:
        while not ended.wait(seconds):
            now = steps()
            moved = [run for run in queue if now[run.name] != before[run.name]]
            if moved:
                say("; ".join(f"{run.name} at step {now[run.name]:,} of {run.steps:,}" for run in moved))
            before = now

    thread = threading.Thread(target=tell, args=(steps(),), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def check_room(place: Workplace) -> None:
    """`CheckpointError` where a state file of the largest size or a result could not be written."""
    for folder, size in ((place.states, MAX_BYTES), (place.results, 1)):
        make_folder(folder)
        probe = folder / ".room"
        write_atomically(probe, bytes(size))
        probe.unlink()


def _collect(queue: Sequence[QueuedRun], place: Workplace, jobs: int) -> None:
    """Results of runs that ended when nobody was there to write them: the process was killed just then."""
    found = place.found()
    for run in queue:
        folder = place.run_folder(run)
        if run.name not in found.runs and folder.config.exists():
            _close(run, read_state(folder.path, run.config), place, jobs, check=False)


def _close(run: QueuedRun, state: RunState, place: Workplace, jobs: int, check: bool = True) -> None:
    if state.word in (FINISHED, DIVERGED):
        write_result(place.results, run, state, place.run_folder(run), jobs)
        place.state_file(run).unlink(missing_ok=True)
    elif check and state.word == FAILED:
        check_room(place)  # a full disk fails every run: stop at the first


def _save(runs: Sequence[QueuedRun], place: Workplace) -> None:
    """A state file for each run that has begun; one that cannot be written does not keep the others from it."""
    troubles = []
    for run in runs:
        if not (place.results / f"{run.name}.json").exists():
            try:
                pack(run.name, place.run_folder(run), place.state_file(run))
            except CheckpointError as trouble:
                troubles.append(trouble)
    if troubles:
        raise troubles[0]
