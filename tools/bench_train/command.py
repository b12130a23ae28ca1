"""The command: which rows, on which device, what is kept."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from .goals import ABSENT, SPARSIFY, STEPS, WORKS
from .measure import Settings, entrants_on, measure, measure_sparsify
from .page import page
from .results import GOAL_TITLES, TITLES, Results, goals, of_sparsify, table

DESCRIPTION = """Training steps of fxsparse (RigL, ERK, 90%) beside dense training, eager and compiled, and beside
rigl-torch and sparsimony, which are installed into .peers/ at first use, or left out with a word. A finished row is
kept in the JSON file at once: Ctrl-C loses the present one only, and --resume goes on."""

ROWS = (*WORKS, "sparsify")
PEERS = ("rigl-torch", "sparsimony")
LEAVABLE = ("dense compiled", "fxsparse compiled", "dense CUDA graphs", "fxsparse CUDA graphs", *PEERS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(%(default)s)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"{', '.join(ROWS)} (all)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each contender takes (%(default)s)")
    parser.add_argument(
        "--steps",
        type=int,
        help="steps after which the sparsity is looked at ({cpu} on a CPU, {cuda:,} on a GPU)".format(**STEPS),
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        choices=LEAVABLE,
        metavar="NAME",
        help="contenders to leave out: " + ", ".join(f'"{name}"' if " " in name else name for name in LEAVABLE),
    )
    parser.add_argument("--no-install", action="store_true", help="leave out what is not in .peers/ yet")
    parser.add_argument("--batch", type=int, help="another batch size, to try things out")
    parser.add_argument("--size", type=int, help="another picture side in pixels, to try things out")
    parser.add_argument(
        "--json", type=Path, help="file of the results (FILE.json of --write, else runs/bench/train.json)"
    )
    parser.add_argument("--resume", action="store_true", help="skip what the JSON file already has, measured alike")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="also write the page, the JSON file beside it")


def bench_train(arguments: argparse.Namespace) -> int:
    """Measures what is asked for; 130 where Ctrl-C ended it, 1 where a contender of ours failed."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: PyTorch sees no CUDA device here; --device cpu measures without one", file=sys.stderr)
        return 2
    for name in ("rounds", "threads", "steps", "batch", "size"):
        number = getattr(arguments, name)
        if number is not None and number < 1:
            print(f"error: --{name} {number}: it must be at least 1", file=sys.stderr)
            return 2
    default = arguments.write.with_suffix(".json") if arguments.write else Path("runs/bench/train.json")
    results = Results(arguments.json or default, arguments.device)
    rows = arguments.rows or [row for row in ROWS if row != "sparsify" or arguments.device == "cpu"]
    stopped = False
    try:
        run_rows(rows, arguments, results)
    except KeyboardInterrupt:
        stopped = True
        print("\nstopped; what is finished is kept. --resume goes on", file=sys.stderr)
    print(tabulate(table(results.groups, rows), TITLES, disable_numparse=True))
    if "sparsify" in rows:
        print(tabulate(of_sparsify(results.groups), ("", "least s", "first s", ""), disable_numparse=True))
    print(tabulate(goals(results.sections), GOAL_TITLES, disable_numparse=True))
    if arguments.write:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text(page(results.sections))
    print(f"results: {results.path}")
    if stopped:
        return 130
    records = [record for group in results.groups if group["row"] in rows for record in group["records"]]
    ours = [record for record in records if record["label"] not in PEERS]
    return int(any(record["failed"] not in (None, ABSENT) for record in ours))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_rows(rows: list[str], arguments: argparse.Namespace, results: Results) -> None:
    """Measures each row and keeps it; a contender that fails is named and the rest goes on."""
    settings = Settings(
        arguments.rounds,
        arguments.steps or STEPS[arguments.device],
        arguments.threads,
        not arguments.no_install,
        tuple(arguments.without),
    )
    kept = {name: getattr(settings, name) for name in ("rounds", "steps", "threads")} | {"without": arguments.without}
    for row in rows:
        case: dict[str, Any] = {}
        if row in WORKS:
            case = WORKS[row].case(arguments.device, arguments.batch, arguments.size)
        group = {"row": row, "case": case, "settings": kept}
        if arguments.resume and results.finished(group):
            say(f"{row}: kept")
            continue
        say(f"{row} on {arguments.device}")
        start = time.perf_counter()
        if row == "sparsify":
            records = measure_sparsify(list(SPARSIFY), settings, say)
        else:
            records = measure(case, entrants_on(arguments.device), settings, say)
        results.add({**group, "records": records})
        say(f"    done in {time.perf_counter() - start:.0f} s")
