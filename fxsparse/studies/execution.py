"""Doing the runs of a plan: one after the other here, or several at a time in processes of their own.

What happens is said in one line a run. A run that fails does not stop the others; those that need it fail with
it. Ctrl-C, SIGTERM and the time limit let the running steps complete and save.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from fxsparse.core.errors import DataError
from fxsparse.studies.plan import PlannedRun
from fxsparse.studies.run_state import (
    DIVERGED,
    FAILED,
    FINISHED,
    INTERRUPTED,
    RunState,
    note_failure,
    read_state,
    train_there,
    with_threads,
)
from fxsparse.studies.stopping import stopped_after
from fxsparse.studies.worker import DATA_MISSING, start_worker
from fxsparse.studies.worker import INTERRUPTED as INTERRUPTED_WORKER

POLL_SECONDS = 0.1
States = dict[Path, RunState]  # run folder -> how far it has come


def read_states(runs: Sequence[PlannedRun]) -> States:
    """How far every run has come; `ConfigError` if one of them was made with other options."""
    return {run.folder: read_state(run.folder, run.config) for run in runs}


def execute(
    runs: Sequence[PlannedRun],
    *,
    jobs: int = 1,
    limit_minutes: float | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
    closed: Callable[[PlannedRun, RunState], None] = lambda run, state: None,
) -> bool:
    """Do what is left of a plan; True unless the time limit stopped it.

    Args:
        jobs: runs at a time; more than one each get a process and their share of the cores.
        limit_minutes: stop after so long, with the running runs saved.
        progress: a bar for the run in progress, on stderr, where there is one at a time.
        say: takes the line that each run gets.
        closed: told of each run that ended here, well or not, before the next one starts.

    Raises:
        ConfigError: before anything is trained: a run in the folder was made with other options.
        DataError: a data set is missing or damaged.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when everything is saved.
    """
    ledger = _Ledger(runs, read_states(runs), say, closed)
    with stopped_after(limit_minutes) as limit:
        try:
            if jobs == 1:
                _one_by_one(ledger, progress)
            else:
                _in_processes(ledger, jobs)
        except KeyboardInterrupt:
            if limit.passed:
                return False
            raise
    return True


@dataclass(frozen=True)
class _Job:
    """A run in a worker, since `began` (`time.monotonic`); `said` gives what the worker says of missing data."""

    run: PlannedRun
    began: float
    process: BaseProcess
    said: Connection


class _Ledger:
    """Which runs are done, which can start, and the line that each gets."""

    def __init__(
        self,
        runs: Sequence[PlannedRun],
        states: States,
        say: Callable[[str], None],
        closed: Callable[[PlannedRun, RunState], None],
    ):
        self.runs, self.states, self.say, self.closed = runs, states, say, closed
        self.open = [run for run in runs if states[run.folder].word not in (FINISHED, DIVERGED)]
        self.tried: set[Path] = set()  # in this call
        self.trained_here = 0
        self.began = time.monotonic()
        left = f", {len(self.open)} to do" if len(self.open) < len(runs) else ""
        say(f"{len(runs)} runs{left}")

    def next_run(self) -> PlannedRun | None:
        """A run whose prerequisites are finished; runs that can never start are taken out as failed."""
        for run in list(self.open):
            missing = [folder for folder in run.needs if self.states[folder].word != FINISHED]
            lost = [folder for folder in missing if self._is_lost(folder)]
            if lost:
                error = f"needs {lost[0].name}, which {self.states[lost[0]].word}"
                self.close(run, note_failure(run.folder, error), time.monotonic())
            elif not missing:
                self.open.remove(run)
                return run
        return None

    def close(self, run: PlannedRun, state: RunState, began: float) -> None:
        """Take down how a run ended."""
        if run in self.open:
            self.open.remove(run)
        self.states[run.folder] = state
        self.tried.add(run.folder)
        if state.result is not None:
            self.trained_here += 1
            outcome = f"{describe_score(state)}, {time.monotonic() - began:.0f} s{self._left()}"
        else:
            outcome = f"{state.word}: {state.error}"
        settled = {folder for folder, each in self.states.items() if each.word in (FINISHED, DIVERGED)}
        self.say(f"[{len(settled | self.tried)}/{len(self.runs)}] {run.name}: {outcome}")
        self.closed(run, state)

    def _is_lost(self, folder: Path) -> bool:
        word = self.states[folder].word
        return word == DIVERGED or (word == FAILED and folder in self.tried)

    def _left(self) -> str:
        if not self.open:
            return ""
        seconds = (time.monotonic() - self.began) / self.trained_here * len(self.open)
        return f"; about {seconds / 60:.0f} min left" if seconds >= 90 else f"; about {seconds:.0f} s left"


def describe_score(state: RunState) -> str:
    """`accuracy 0.9123` of a finished run."""
    assert state.result is not None
    return f"{state.result.metric} {state.result.score:.4f}"


def _one_by_one(ledger: _Ledger, progress: bool) -> None:
    while (run := ledger.next_run()) is not None:
        began = time.monotonic()
        ledger.close(run, train_there(run.folder, run.config, progress), began)


def _in_processes(ledger: _Ledger, jobs: int) -> None:
    running: list[_Job] = []
    try:
        while True:
            while len(running) < jobs and (run := ledger.next_run()) is not None:
                config = with_threads(run.config, jobs, os.cpu_count() or 1)
                running.append(_Job(run, time.monotonic(), *start_worker(run.folder, config)))
            if not running:
                return
            for job in [job for job in running if not job.process.is_alive()]:
                running.remove(job)
                ledger.close(job.run, _outcome(job), job.began)
            time.sleep(POLL_SECONDS)
    finally:
        _stop([job.process for job in running])


def _outcome(job: _Job) -> RunState:
    """How a worker that has ended left its run."""
    code = job.process.exitcode
    assert code is not None
    if code == DATA_MISSING:
        raise DataError(job.said.recv())
    state = read_state(job.run.folder, job.run.config)
    if state.word in (FINISHED, FAILED, DIVERGED):
        return state
    if code == INTERRUPTED_WORKER:
        return RunState(INTERRUPTED, error="its process was asked to stop", step=state.step)
    died = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return note_failure(job.run.folder, f"its process died ({died})")


def _stop(running: Sequence[BaseProcess]) -> None:
    """Ask workers to save and stop, and wait until they have; a second Ctrl-C asks again, for at once."""
    for ask in (BaseProcess.terminate, BaseProcess.terminate, BaseProcess.kill):
        try:
            for process in running:
                if process.is_alive():
                    ask(process)
            for process in running:
                process.join()
            return
        except KeyboardInterrupt:
            continue
