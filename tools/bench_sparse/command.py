"""The command: which rows, in which order, what is kept."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from bench_parts.peers import Worker
from tabulate import tabulate

from . import results as results_file
from .goals import WORKS, Work
from .measure import Settings, entrants_of, measure
from .results import Results
from .sweep import SPARSITIES as SWEPT
from .sweep import measure_bounds, sweep_entrants, sweep_page

DESCRIPTION = """Ours beside dense PyTorch, torch.compile, ONNX Runtime, OpenVINO and SparseProp. The last two are
installed into .peers/ at first use, or left out with a word. A finished row is kept in the JSON file at once: Ctrl-C
loses the present one only, and --resume goes on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "--rows", nargs="+", choices=list(WORKS), default=list(WORKS), metavar="ROW", help=", ".join(WORKS)
    )
    parser.add_argument("--sparsities", nargs="+", type=_sparsity, default=[0.8, 0.9, 0.95])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7, help="turns that each contender takes (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.2, help="least length of a turn (%(default)s)")
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        choices=["inductor", "onnxruntime", "openvino", "sparseprop"],
        metavar="NAME",
        help="competitors to leave out: inductor, onnxruntime, openvino, sparseprop",
    )
    parser.add_argument("--no-install", action="store_true", help="leave out what is not in .peers/ yet")
    parser.add_argument("--batch", type=int, help="another batch size, to try things out")
    parser.add_argument("--size", type=int, help="another picture side or text length, to try things out")
    parser.add_argument(
        "--layers",
        action="store_true",
        help="instead of the rows: the break-even sparsity of each layer shape, and a roofline picture",
    )
    parser.add_argument(
        "--json", type=Path, help="file of the results (FILE.json of --write, else runs/bench/sparse.json)"
    )
    parser.add_argument("--resume", action="store_true", help="skip what the JSON file already has, measured alike")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="also write the page, the JSON file beside it")


def _sparsity(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: a sparsity lies between 0 and 1")
    return value


def bench_sparse(arguments: argparse.Namespace) -> int:
    """Measures what is asked for; 130 where Ctrl-C ended it, 1 where a contender of ours failed."""
    default = arguments.write.with_suffix(".json") if arguments.write else Path("runs/bench/sparse.json")
    results = Results(arguments.json or default)
    stopped = False
    try:
        (run_sweep if arguments.layers else run_rows)(arguments, results)
    except KeyboardInterrupt:
        stopped = True
        print("\nstopped; what is finished is kept. --resume goes on", file=sys.stderr)
    sweep = ""
    if results.bounds:
        picture = (arguments.write or results.path).with_suffix(".svg")
        sweep = sweep_page(results, picture)
    rows = [] if arguments.layers else arguments.rows
    lines = results_file.table(results, rows)
    if arguments.layers:
        print(sweep)
    print(tabulate(lines, results_file.TITLES, disable_numparse=True) if lines or not arguments.layers else "")
    if arguments.write:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text(results_file.page(results, sweep))
    print(f"results: {results.path}")
    return 130 if stopped else 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def settings_of(arguments: argparse.Namespace) -> Settings:
    return Settings(arguments.rounds, arguments.seconds, not arguments.no_install, tuple(arguments.without))


def case_of(work: Work, arguments: argparse.Namespace) -> dict[str, Any]:
    given = {"batch": arguments.batch, "size": arguments.size}
    return work.case(**{key: value for key, value in given.items() if value})


def run_rows(arguments: argparse.Namespace, results: Results) -> None:
    for threads in arguments.threads:
        for row in arguments.rows:
            work = WORKS[row]
            case = case_of(work, arguments)
            if work.kind == "storage" and threads != arguments.threads[0]:
                continue  # bytes do not depend on threads
            entrants = entrants_of(work, arguments.sparsities)
            if work.kind == "layers":
                run_layers(row, case, entrants, arguments.sparsities, threads, arguments, results)
            else:
                run_group({"row": row}, case, entrants, arguments.sparsities, threads, arguments, results)


def run_layers(
    row: str,
    case: dict[str, Any],
    entrants: list,
    sparsities: list[float],
    threads: int,
    arguments: Any,
    results: Results,
) -> None:
    """Each distinct layer is a group of its own; the processes are shared."""
    from .single_layers import distinct_layers, name_of

    pool: dict[str, Worker] = {}
    try:
        for layer in distinct_layers(case):
            group = {"row": row, "layer": name_of(layer), "shape": list(layer)}
            run_group(group, {**case, "layer": list(layer)}, entrants, sparsities, threads, arguments, results, pool)
    finally:
        for worker in pool.values():
            worker.close()


def run_group(
    group: dict[str, Any],
    case: dict[str, Any],
    entrants: list,
    sparsities: list[float],
    threads: int,
    arguments: argparse.Namespace,
    results: Results,
    pool: dict[str, Worker] | None = None,
) -> None:
    """Measures a group and keeps it; a contender that fails is named and the rest goes on."""
    settings = settings_of(arguments)
    kept = {"rounds": settings.rounds, "seconds": settings.seconds, "batch": case["batch"], "size": case["size"]}
    group = {**group, "threads": threads, "sparsities": sparsities, "settings": kept}
    name = f"{group['row']} {group.get('layer', '')}".strip() + f", {threads} thread{'s' * (threads > 1)}"
    if arguments.resume and results.finished(group):
        say(f"{name}: kept")
        return
    say(name)
    start = time.perf_counter()
    group["records"] = measure(case, entrants, threads, settings, say, pool)
    results.add(group)
    say(f"    done in {time.perf_counter() - start:.0f} s")


def run_sweep(arguments: argparse.Namespace, results: Results) -> None:
    """Each layer shape from SPARSITIES' least to its greatest, dense and ours, and the machine's bounds."""
    work = WORKS["layers"]
    for threads in arguments.threads:
        if str(threads) not in results.bounds or not arguments.resume:
            results.bounds[str(threads)] = measure_bounds(threads)
            results.save()
        case = case_of(work, arguments)
        run_layers("sweep", case, sweep_entrants(), list(SWEPT), threads, arguments, results)
