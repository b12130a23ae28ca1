"""Measures a row: every contender in a process of its own, their turns taken one after the other."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from bench_parts import peers
from bench_parts.peers import Left, python_of

from .goals import ABSENT

LARGEST_DIFFERENCE = {"fp32": 1e-3, "bf16": 2e-2}
"""Relative, of the first loss: compiled beside eager."""


class Worker(peers.Worker):
    """A process with one contender."""

    module = "bench_train.worker"


@dataclass(frozen=True)
class Entrant:
    """A contender: `over` is the label of the one that its times are divided by; None is dense itself."""

    label: str
    trainer: str
    over: str | None = None
    compile: str | None = None


def entrants_on(device: str) -> list[Entrant]:
    """Everything that a row compares."""
    modes = [("eager", None), ("compiled", "default")]
    if device == "cuda":
        modes.append(("CUDA graphs", "reduce-overhead"))
    found = []
    for word, mode in modes:
        found.append(Entrant(f"dense {word}", "dense", None, mode))
        found.append(Entrant(f"fxsparse {word}", "fxsparse", f"dense {word}", mode))
    return [*found, *(Entrant(name, name, "dense eager") for name in ("rigl-torch", "sparsimony"))]


@dataclass(frozen=True)
class Settings:
    rounds: int = 5
    steps: int = 100
    threads: int = 1
    install: bool = True
    without: tuple[str, ...] = ()


Say = Callable[[str], None]
Record = dict[str, Any]


@dataclass
class Running:
    """A contender that is loaded, until something fails."""

    worker: Worker
    number: int
    record: Record
    turns: list[dict[str, list[float]]]

    def ask(self, do: str, **more: Any) -> dict[str, Any] | None:
        """The answer; None where it failed, now or before, and the record says why."""
        if self.record["failed"]:
            return None
        try:
            return self.worker.ask({"do": do, "number": self.number, **more})
        except Left as left:
            self.record["failed"] = str(left)
            return None


def measure(case: dict[str, Any], entrants: Sequence[Entrant], settings: Settings, say: Say) -> list[Record]:
    """A record for each entrant: seconds, bytes, what became of masks and losses, or why it is left out."""
    with ExitStack() as stack:
        running: list[Running] = []
        records: list[Record] = []
        for entrant in entrants:
            record: Record = {"label": entrant.label, "over": entrant.over, "failed": None}
            records.append(record)
            start = time.perf_counter()
            try:
                if entrant.label in settings.without or entrant.trainer in settings.without:
                    raise Left(ABSENT)
                worker = stack.enter_context(Worker(python_of(entrant.trainer, settings.install), settings.threads))
                answer = worker.load(entrant.trainer, {**case, "compile": entrant.compile})
                record["first_loss"] = answer["first_loss"]
                check_first_loss(record, records, case["precision"])
                running.append(Running(worker, answer["number"], record, []))
            except Left as left:
                record["failed"] = str(left)
            say(f"    {entrant.label}: {record['failed'] or f'ready in {time.perf_counter() - start:.0f} s'}")
        for turn in range(settings.rounds):
            for one in running:
                if times := one.ask("turn"):
                    one.turns.append(times)
            say(f"    turn {turn + 1} of {settings.rounds}")
        for one in running:
            if memory := one.ask("memory"):
                one.record |= {"memory": memory, **summary(one.turns)}
        for one in running:
            start = time.perf_counter()
            if end := one.ask("end", steps=settings.steps):
                one.record["end"] = end
                one.record["failed"] = fault(end)
                say(f"    {one.record['label']}: {end['steps']} steps, {time.perf_counter() - start:.0f} s")
            one.worker.close()
            if one.record["failed"]:
                say(f"    {one.record['label']}: {one.record['failed']}")
        return records


def check_first_loss(record: Record, records: Sequence[Record], precision: str) -> None:
    """Compiled or not, a contender's first loss is the same. Raises Left."""
    name = record["label"].partition(" ")[0]
    eager = next((r for r in records if r["label"] == f"{name} eager" and not r["failed"]), None)
    if eager is None:
        return
    mine, theirs = record["first_loss"], eager["first_loss"]
    if not math.isclose(mine, theirs, rel_tol=LARGEST_DIFFERENCE[precision]):
        raise Left(f"wrong numbers: the first loss is {mine:.4f}, in eager mode {theirs:.4f}")


FEW_STEPS = 50
"""In fewer a loss may well rise."""


def fault(end: dict[str, Any]) -> str | None:
    """Why a contender's times mean nothing: it did not train, or its masks did not change."""
    first, last = end["losses"]
    if not end["finite"] or not last < first:
        advice = f"; take more --steps, {FEW_STEPS} or more" if end["finite"] and end["steps"] < FEW_STEPS else ""
        return f"it does not train: loss {first:.3f} at first, {last:.3f} after {end['steps']} steps{advice}"
    if end["layers"] and not end["moved"]:
        return f"its masks did not change in {end['steps']} steps"
    return None


def summary(turns: Sequence[dict[str, list[float]]]) -> dict[str, Any]:
    """Least and median of wall-clock seconds, and the least of processor seconds, which others disturb less."""
    found: dict[str, Any] = {"times": len(turns)}
    for name, clock, choose in (("least", 0, min), ("median", 0, statistics.median), ("cpu", 1, min)):
        found[name] = {key: choose([turn[key][clock] for turn in turns]) for key in turns[0]}
    return found


def measure_sparsify(networks: Sequence[str], settings: Settings, say: Say) -> list[Record]:
    """Seconds of `sparsify`: the least of several times in one process."""
    records: list[Record] = []
    for name in networks:
        record: Record = {"label": name, "over": None, "failed": None}
        records.append(record)
        try:
            with Worker(python_of("fxsparse", settings.install), settings.threads) as worker:
                request = {"do": "sparsify", "network": name, "threads": settings.threads}
                seconds = [worker.ask(request)["seconds"] for _ in range(settings.rounds)]
            record |= {"seconds": min(seconds), "first_seconds": seconds[0], "times": len(seconds)}
        except Left as left:
            record["failed"] = str(left)
        say(f"    {name}: {record['failed'] or str(round(record['seconds'], 2)) + ' s'}")
    return records
