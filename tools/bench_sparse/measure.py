"""Times the contenders of one row in turns, each in a process of its own, and checks their numbers."""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from bench_parts.peers import Left, Worker, python_of

from .goals import CYCLE, INTERVAL, Work

LARGEST_ERROR = {"inference": 1e-3, "layers": 1e-3, "training": 5e-2, "storage": 5e-2}
"""Relative; a training step's is that of the worst tensor's change, and a ReLU at 0 may go either way."""


@dataclass(frozen=True)
class Entrant:
    """What is timed: `role` is "dense", "rival" (as sparse as ours) or "ours"; `more` joins the case."""

    label: str
    contender: str
    role: str = "dense"
    sparsity: float | None = None
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    rounds: int = 7
    seconds: float = 0.2
    install: bool = True
    without: tuple[str, ...] = ()


FORMATS = (("eager NCHW", "contiguous"), ("eager channels_last", "channels_last"))


def entrants_of(work: Work, sparsities: Iterable[float]) -> list[Entrant]:
    """Everything that a row compares, ours last."""
    found: list[Entrant] = []
    if work.kind == "storage":
        found.append(Entrant("eager", "eager"))
    elif work.network == "char_gru":
        found += [Entrant("eager", "eager"), Entrant("compile", "inductor")]
        found += [Entrant("eager nn.GRU", "eager", more={"variant": "nn.GRU"})]
    else:
        found += [Entrant(label, "eager", more={"format": layout}) for label, layout in FORMATS]
    if work.kind in ("inference", "training") and work.network != "char_gru":
        labels = [(label.replace("eager", "compile"), layout) for label, layout in FORMATS]
        found += [Entrant(label, "inductor", more={"format": layout}) for label, layout in labels]
    if work.kind == "inference":
        found += [Entrant("ONNX Runtime", "onnxruntime"), Entrant("OpenVINO", "openvino")]
        if work.network == "char_gru":
            found += [Entrant("ONNX Runtime nn.GRU", "onnxruntime", more={"variant": "nn.GRU"})]
            found += [Entrant("OpenVINO nn.GRU", "openvino", more={"variant": "nn.GRU"})]
    for sparsity in sparsities:
        if work.kind == "layers":
            for over in ("over batch", "over width"):
                found.append(Entrant(f"SparseProp {over}", "sparseprop", "rival", sparsity, {"variant": over}))
        more = {"variant": "nn.GRU"} if work.network == "char_gru" else {}
        found.append(Entrant("fxsparse", "ours", "ours", sparsity, more))
    return found


def measure(
    case: dict[str, Any],
    entrants: Sequence[Entrant],
    threads: int,
    settings: Settings,
    say: Callable[[str], None],
    pool: dict[str, Worker] | None = None,
) -> list[dict[str, Any]]:
    """A record for each entrant: seconds (least and median), error, facts, and why it is left out, where it is.

    With `pool`, entrants of one environment share the process that stands there; else each has its own.
    """
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        records, running = [], []
        exported: dict[str, str | Left] = {}
        for entrant in entrants:
            own = {**case, **entrant.more, "sparsity": entrant.sparsity, "folder": folder}
            record = {"label": entrant.label, "role": entrant.role, "sparsity": entrant.sparsity, "failed": None}
            records.append(record)
            start = time.perf_counter()
            try:
                if entrant.contender in settings.without:
                    raise Left("left out by --without")
                python = python_of(entrant.contender, settings.install)
                if entrant.contender in ("onnxruntime", "openvino"):
                    own["folder"] = _exported(own, exported, threads)
                worker = _worker(entrant, python, threads, stack, pool)
                answer = worker.load(entrant.contender, own)
                record |= {"error": answer["error"], **answer["facts"]}
                _check(case["kind"], answer["error"])
                running.append((worker, answer["number"], record, []))
            except Left as left:
                record["failed"] = str(left)
                if pool:  # a process that ended must not be asked again
                    for key in [key for key, worker in pool.items() if worker.process.poll() is not None]:
                        pool.pop(key).close()
            name = entrant.label + ("" if entrant.sparsity is None else f" at {entrant.sparsity:.0%}")
            say(f"    {name}: {record['failed'] or f'ready in {time.perf_counter() - start:.0f} s'}")
        for _ in range(settings.rounds if case["kind"] != "storage" else 0):
            for worker, number, record, turns in running:
                if not record["failed"]:
                    try:
                        turns += worker.run(number, settings.seconds)
                    except Left as left:
                        record["failed"] = str(left)
        for worker, number, record, turns in running:
            if pool and worker.process.poll() is None:
                worker.drop(number)
            if turns and not record["failed"]:
                record |= summary(turns)
        return records


def _exported(case: dict[str, Any], exported: dict[str, str | Left], threads: int) -> str:
    """The folder with the network as ONNX, written once for a variant. Raises Left."""
    variant = case.get("variant", "")
    if variant not in exported:
        folder = tempfile.mkdtemp(dir=case["folder"])
        try:
            with Worker(python_of("export"), threads) as worker:
                worker.load("export", {**case, "folder": folder})
            exported[variant] = folder
        except Left as left:
            exported[variant] = Left(f"the network was not exported to ONNX: {left}")
    written = exported[variant]
    if isinstance(written, Left):
        raise written
    return written


def _worker(entrant: Entrant, python: str, threads: int, stack: ExitStack, pool: dict[str, Worker] | None) -> Worker:
    if pool is None:
        return stack.enter_context(Worker(python, threads))
    if entrant.contender not in pool:
        pool[entrant.contender] = Worker(python, threads)
    return pool[entrant.contender]


def _check(kind: str, error: float | None) -> None:
    if error is not None and not error <= LARGEST_ERROR[kind]:
        raise Left(f"wrong numbers: relative error {error:.1e}, at most {LARGEST_ERROR[kind]:.0e} is accepted")


def summary(turns: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Least and median of wall-clock seconds, and the least of processor seconds, which others disturb less.

    A turn of several steps is a cycle that ends in an update step. Of those, an interval of 100 steps counts: the
    update step, the step after it, and 98 ordinary ones.
    """
    found: dict[str, Any] = {"times": len(turns)}
    for name, clock, choose in (("least", 0, min), ("median", 0, statistics.median), ("cpu", 1, min)):
        if len(turns[0]) == 1:
            found[name] = choose([turn[0][clock] for turn in turns])
            continue
        after, *ordinary, update = ([turn[place][clock] for turn in turns] for place in range(CYCLE))
        step = choose([seconds for place in ordinary for seconds in place])
        found[name] = ((INTERVAL - 2) * step + choose(after) + choose(update)) / INTERVAL
        found[f"ordinary_{name}"], found[f"update_{name}"] = step, choose(update)
    return found


def best(records: Iterable[dict[str, Any]], sparsity: float, key: str = "least") -> dict[str, Any] | None:
    """The best that ours is compared to at a sparsity: the rival as sparse where there are rivals, else the dense."""
    fits = [r for r in records if not r["failed"] and r["role"] != "ours" and r["sparsity"] in (None, sparsity)]
    rivals = [record for record in fits if record["role"] == "rival"]
    return min(rivals or [r for r in fits if r["role"] == "dense"], key=lambda r: r.get(key, math.inf), default=None)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
