"""Runs measurements, one model a process, with limits of time and memory; every row is written as it is made."""

import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

Job = tuple[str, str]


def read_rows(folder: Path) -> dict[Job, dict[str, Any]]:
    """The last row of every model; a line that was cut off is as if the model had not been run."""
    rows = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows[row["set"], row["model"]] = row
    return rows


def run(
    jobs: Sequence[Job], measure: Callable[[str, str], dict[str, Any]], folder: Path, *, at_once: int, limits: "Limits"
) -> None:
    """Measures every job and appends its row to `<folder>/<set>.jsonl`.

    Processes are forked, so that what this process has imported is there already.

    Raises:
        KeyboardInterrupt: after the running processes were ended; finished rows stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting = list(reversed(jobs))
    running: list[_Running] = []
    bar = tqdm(total=len(jobs), unit="model", smoothing=0.05)
    shown = ""
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_Running(waiting.pop(), measure, limits))
            for process in list(running):
                row = process.result()
                if row is not None:
                    running.remove(process)
                    _append(folder, row)
                    bar.update()
                    if row["status"] != "captured":
                        bar.write(f"{row['set']} {row['model']}: {row['status']}: {row.get('reason', '')}"[:300])
            present = " ".join(process.job[1] for process in running)
            bar.set_postfix_str(present, refresh=present != shown)
            shown = present
            time.sleep(0.02)
    finally:
        for process in running:
            process.end()
        bar.close()


def _append(folder: Path, row: dict[str, Any]) -> None:
    with (folder / f"{row['set']}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


class Limits:
    """Seconds and gigabytes that one model may take."""

    def __init__(self, seconds: float, gigabytes: float) -> None:
        self.seconds = seconds
        self.gigabytes = gigabytes


class _Running:
    """One process that measures one model."""

    def __init__(self, job: Job, measure: Callable[[str, str], dict[str, Any]], limits: Limits) -> None:
        context = multiprocessing.get_context("fork")
        self.job = job
        self.limits = limits
        self.began = time.perf_counter()
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_measure_one, args=(measure, job, sender), daemon=True)
        self.process.start()
        sender.close()

    def result(self) -> dict[str, Any] | None:
        """The row once there is one: measured, or of a process that was ended or died."""
        if self.receiver.poll():
            try:
                row = self.receiver.recv()
            except EOFError:  # died without a word
                self.process.join(5)
                return self._lost(f"the process ended with code {self.process.exitcode}")
            self.end()
            return row
        if time.perf_counter() - self.began > self.limits.seconds:
            self.end()
            return self._lost(f"took longer than {self.limits.seconds:g} seconds")
        if _gigabytes(self.process.pid) > self.limits.gigabytes:
            self.end()
            return self._lost(f"took more than {self.limits.gigabytes:g} GB of memory")
        return None

    def end(self) -> None:
        """Ends this process and waits for it."""
        self.process.kill()
        self.process.join()
        self.receiver.close()

    def _lost(self, reason: str) -> dict[str, Any]:
        return {"set": self.job[0], "model": self.job[1], "status": "failed", "reason": reason}


def _measure_one(measure: Callable[[str, str], dict[str, Any]], job: Job, sender: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    try:
        row = measure(*job)
    except Exception as error:
        frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-3:]]
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} ({' > '.join(frames)})"
        row = {"set": job[0], "model": job[1], "status": "failed", "reason": reason}
    sender.send(row)
    sender.close()
    os._exit(0)  # without the clean-up of libraries that this process only inherited


def _gigabytes(process: int | None) -> float:
    """Resident memory; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
