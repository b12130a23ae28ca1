"""Seconds a step of every method, and how many runs at a time a device does the most steps of in a second."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxsparse.core.errors import ConfigError, FxSparseError
from fxsparse.training import TrainConfig
from fxsparse.training.checkpoint import write_atomically
from fxsparse.training.experiment import Experiment, build, choose_device
from fxsparse.training.summary import device_name, versions

SECONDS_KIND, JOBS_KIND = "reproduction seconds a step", "reproduction runs at a time"
KINDS = (SECONDS_KIND, JOBS_KIND)
WARM_UP = 3  # steps that are not counted: memory is allocated, kernels are chosen
COUNTS = (1, 2, 4, 8, 16)
WORTH_IT = 1.1  # doubling the runs at a time has to give so many times the steps a second


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a training step, everything in it: the batch, forward, backward, update.

    On one CPU thread they are processor seconds, to which other work on the machine adds little; else wall-clock ones.

    Attributes:
        method: as `PublishedRow.label`.
        ordinary: the least of a step in which weights move: a busy machine only adds to it.
        update: the least of a step that rewires; None where none was made.
        mean: of both, as a run has them: one step in an update interval rewires.
        steps: how many were timed.
    """

    method: str
    ordinary: float
    update: float | None
    mean: float
    steps: int


def time_steps(method: str, config: TrainConfig, steps: int) -> StepSeconds:
    """Times `steps` steps of a run, a few of which rewire if its method does.

    Args:
        method: a name for the record.
        config: resolved; of the run, whose interval is shortened for the measurement.
    """
    interval = config.update_interval or 1
    often = max(2, steps // 3)
    parts = build(dataclasses.replace(config, update_interval=often, verify=False))
    now = clock_of(parts.device)
    ordinary: list[float] = []
    updates: list[float] = []
    batches = _batches(parts)
    for step in range(steps):
        before = parts.rewirer.update_count
        _wait_for(parts.device)
        began = now()
        parts.train_step(*next(batches), step)
        _wait_for(parts.device)
        took = now() - began
        (updates if parts.rewirer.update_count > before else ordinary).append(took)
    plain, update = min(ordinary), min(updates, default=None)
    mean = plain if update is None else (plain * (interval - 1) + update) / interval
    return StepSeconds(method, plain, update, mean, steps)


def clock_of(device: torch.device) -> Callable[[], float]:
    """The clock that a step is timed by."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _batches(parts: Experiment) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = 0
    while True:
        yield from parts.train_batches.epoch(epoch)
        epoch += 1


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def threads_of(config: TrainConfig) -> Iterator[None]:
    """As many torch threads within the block as the run would have."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Throughput:
    """Steps a second of `count` equal runs at a time, all together; `problem` says why there is no figure."""

    count: int
    steps_a_second: float | None
    problem: str = ""


def find_jobs(
    config: TrainConfig,
    *,
    counts: Sequence[int] = COUNTS,
    seconds: float = 10.0,
    say: Callable[[str], None] = print,
) -> tuple[int, list[Throughput]]:
    """How many runs at a time do the most steps a second, and what was measured on the way there.

    The counts are tried in their order until one gives less than `WORTH_IT` times the one before it, or fails.

    Raises:
        FxSparseError: not even the first count works.
    """
    tried: list[Throughput] = []
    best = counts[0]
    for count in counts:
        found = measure_together(config, count, seconds)
        tried.append(found)
        say(f"{count} at a time: {found.problem or f'{found.steps_a_second:.1f} steps a second'}")
        if found.steps_a_second is None:
            if count == counts[0]:
                raise FxSparseError(f"could not train {count} at a time: {found.problem}")
            break
        before = tried[-2].steps_a_second if len(tried) > 1 else None
        if before is not None and found.steps_a_second < WORTH_IT * before:
            break
        best = count
    return best, tried


def measure_together(config: TrainConfig, count: int, seconds: float) -> Throughput:
    """`count` processes train the same for `seconds`, all at the same time."""
    context = multiprocessing.get_context("spawn")
    start, ends, workers = context.Barrier(count), [], []
    threads = config.threads or max(1, (os.cpu_count() or 1) // count)
    config = dataclasses.replace(config, threads=threads, verify=False)
    for _ in range(count):
        here, there = context.Pipe(duplex=False)
        worker = context.Process(target=_train_for, args=(config, seconds, start, there), daemon=True)
        worker.start()
        there.close()
        ends.append(here)
        workers.append(worker)
    try:
        answers = [_answer(end) for end in ends]
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()
    problems = [answer for answer in answers if isinstance(answer, str)]
    if problems:
        return Throughput(count, None, next((each for each in problems if each != _OTHERS_FAILED), problems[0]))
    return Throughput(count, sum(float(answer) for answer in answers))


_OTHERS_FAILED = "another run failed"
_START_TIMEOUT = 300  # seconds, for a run whose process was killed before it could say so


def _answer(end: Connection) -> float | str:
    try:
        return end.recv()
    except EOFError:
        return "its process died"


def _train_for(config: TrainConfig, seconds: float, start: Any, said: Connection) -> None:
    """In a process of its own: build, warm up, wait for the others, and say how many steps a second were made."""
    try:
        torch.set_num_threads(config.threads or 1)
        parts = build(config)
        batches = _batches(parts)
        for step in range(WARM_UP):
            parts.train_step(*next(batches), step)
        _wait_for(parts.device)
        start.wait(_START_TIMEOUT)
        began, done = time.perf_counter(), 0
        while (took := time.perf_counter() - began) < seconds:
            parts.train_step(*next(batches), WARM_UP + done)
            done += 1
            if done % 10 == 0:
                _wait_for(parts.device)  # or the queue of kernels would outlast the time
        _wait_for(parts.device)
        said.send(done / max(took, time.perf_counter() - began))
    except Exception as error:  # out of memory, most likely: the others must not wait for it
        with contextlib.suppress(Exception):
            start.abort()
        said.send(_OTHERS_FAILED if type(error).__name__ == "BrokenBarrierError" else " ".join(str(error).split()))


def name_of_device(name: str, threads: int | None = None) -> str:
    """The device as results name it, with `threads` on a CPU."""
    device = choose_device(name)
    return f"cpu, {threads or torch.get_num_threads()} threads" if device.type == "cpu" else device_name(device)


def _file(folder: Path, word: str, device: str) -> Path:
    return folder / f"{word}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def write_seconds(folder: Path, device: str, config: TrainConfig, rows: Sequence[StepSeconds]) -> Path:
    """The measurement of a device as a file, over an earlier one; its path."""
    content = {
        "kind": SECONDS_KIND,
        "device": device,
        "versions": versions(),
        "batch_size": config.batch_size,
        "model": config.model,
        "interval": config.update_interval,
        "clock": clock_of(choose_device(config.device)).__name__,
        "rows": [asdict(row) for row in rows],
    }
    path = _file(folder, "seconds", device)
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
    return path


def read_seconds(folder: Path) -> dict[str, list[StepSeconds]]:
    """Device -> what was measured on it."""
    return {
        content["device"]: [StepSeconds(**row) for row in content["rows"]] for content in _of_kind(folder, SECONDS_KIND)
    }


def read_clocks(folder: Path) -> dict[str, str]:
    """Device -> "process_time" or "perf_counter", the clock of its measurement."""
    return {content["device"]: content["clock"] for content in _of_kind(folder, SECONDS_KIND)}


def write_jobs(folder: Path, device: str, chosen: int, tried: Sequence[Throughput]) -> Path:
    """How many runs at a time a device takes, as a file; its path."""
    content = {
        "kind": JOBS_KIND,
        "device": device,
        "versions": versions(),
        "chosen": chosen,
        "tried": [asdict(each) for each in tried],
    }
    path = _file(folder, "jobs", device)
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
    return path


def read_jobs(folder: Path) -> dict[str, tuple[int, list[Throughput]]]:
    """Device -> the number of runs at a time that was chosen, and what it was chosen from."""
    return {
        content["device"]: (content["chosen"], [Throughput(**each) for each in content["tried"]])
        for content in _of_kind(folder, JOBS_KIND)
    }


def _of_kind(folder: Path, kind: str) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            continue  # `read_results` names it
        if isinstance(content, dict) and content.get("kind") == kind:
            if "device" not in content:
                raise ConfigError(f"{path} is damaged: it names no device; measure again")
            yield content
