"""Run the reproducibility report's CIFAR-10 tables again, a while at a time, and write what came out.

    python tools/reproduce.py run --minutes 50          the next fifty minutes of the queue; the same command goes on
    python tools/reproduce.py status                    what is done, what has begun, what the rest will take
    python tools/reproduce.py time                      seconds of a step of every method, on this device
    python tools/reproduce.py page                      docs/reproduction.md and its pictures, from results/
    python tools/reproduce.py run --scaled              small runs that a CPU finishes in half an hour

To go on elsewhere take OUT/states (a file for each run that has begun) and the results along.

exit codes of run: 0 complete, 1 a run failed, 2 wrong use or a full disk, 3 stopped by --minutes, 130 Ctrl-C
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxsparse.core.errors import ConfigError, FxSparseError
from fxsparse.reproduction import measure, page
from fxsparse.reproduction.queue import METHODS_TIMED, QueuedRun, Recipe, full_queue, scaled_queue, with_options
from fxsparse.reproduction.slices import Workplace, work
from fxsparse.reproduction.state_files import make_folder
from fxsparse.reproduction.status import listed, read_status, summary
from fxsparse.runtime.semantics import PRESETS
from fxsparse.training.experiment import choose_device

UNFINISHED, INTERRUPTED = 3, 130


def queue_of(arguments: argparse.Namespace) -> list[QueuedRun]:
    """The runs that the flags ask for."""
    default = Recipe()
    recipe = Recipe(arguments.nesterov, arguments.dropout, arguments.stop_step, arguments.semantics)
    if arguments.scaled and recipe != default:
        raise ConfigError("--scaled has a recipe of its own; leave the recipe's flags out")
    runs = scaled_queue() if arguments.scaled else full_queue(recipe)
    options: dict[str, Any] = {"data_root": arguments.data_root}
    if not arguments.scaled:
        options |= {"device": arguments.device, "threads": arguments.threads}
    elif arguments.device not in ("auto", "cpu"):
        raise ConfigError("--scaled is for the CPU; leave --device out")
    if arguments.only:
        kept = [run for run in runs if any(fnmatch.fnmatch(run.name, glob) for glob in arguments.only)]
        if not kept:
            raise ConfigError(f"--only {' '.join(arguments.only)}: no run is called so; the first is {runs[0].name}")
        runs = kept
    return with_options(runs, options)


def place_of(arguments: argparse.Namespace) -> Workplace:
    return Workplace(Path(arguments.out), Path(arguments.results))


def device_of(arguments: argparse.Namespace) -> str:
    """The device's name as the results have it."""
    if arguments.scaled:
        return measure.name_of_device("cpu", 1)
    return measure.name_of_device(arguments.device, arguments.threads)


def run(arguments: argparse.Namespace) -> int:
    """Do a slice of the queue, or list it."""
    if arguments.list:
        return status(arguments)
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise ConfigError(f"--minutes is {arguments.minutes:g}; it must be above 0")
    queue, place = queue_of(arguments), place_of(arguments)
    jobs = jobs_of(arguments, queue, place)
    try:
        complete = work(
            queue, place, jobs=jobs, minutes=arguments.minutes, progress=sys.stderr.isatty(), say=say_on_stderr
        )
    except KeyboardInterrupt:
        print(left_of(arguments, queue, place))
        raise KeyboardInterrupt("interrupted, everything is saved; the same command goes on") from None
    print(left_of(arguments, queue, place))
    done = read_status(queue, place, device_of(arguments), arguments.scaled)
    if any(each.word == "failed" for each in done):
        return 1
    return 0 if complete else UNFINISHED


def left_of(arguments: argparse.Namespace, queue: Sequence[QueuedRun], place: Workplace) -> str:
    device = device_of(arguments)
    return summary(read_status(queue, place, device, arguments.scaled), place, device)


def jobs_of(arguments: argparse.Namespace, queue: Sequence[QueuedRun], place: Workplace) -> int:
    """Runs at a time: as given, as measured on this device, or measured now; 1 on a CPU unless given."""
    if arguments.jobs != "auto":
        if not arguments.jobs.isdigit() or int(arguments.jobs) < 1:
            raise ConfigError(f"--jobs is {arguments.jobs!r}; it takes auto or a number from 1 on")
        return int(arguments.jobs)
    if arguments.scaled or choose_device(arguments.device).type == "cpu":
        return 1
    device = device_of(arguments)
    known = measure.read_jobs(place.results).get(device)
    if known is None:
        say_on_stderr(f"how many runs at a time? measured once on {device}")
        make_folder(place.results)
        known = measure.find_jobs(queue[0].config, say=say_on_stderr)
        measure.write_jobs(place.results, device, *known)
    return known[0]


def status(arguments: argparse.Namespace) -> int:
    """List the queue."""
    queue, place, device = queue_of(arguments), place_of(arguments), device_of(arguments)
    print(listed(read_status(queue, place, device, arguments.scaled), place, device))
    for line in place.found().complaints:
        say_on_stderr(line)
    return 0


def time_methods(arguments: argparse.Namespace) -> int:
    """Measure seconds of a step of every method at full size."""
    if arguments.steps < 1:
        raise ConfigError(f"--steps is {arguments.steps}; it must be 1 or more")
    if arguments.scaled:
        raise ConfigError("time measures full-size runs; leave --scaled out")
    place, device = place_of(arguments), device_of(arguments)
    make_folder(place.results)
    queue = queue_of(arguments)
    rows = []
    for label in METHODS_TIMED:
        config = next(run.config for run in queue if run.place.row.label == label)
        with measure.threads_of(config):
            row = measure.time_steps(label, config, arguments.steps)
            rows.append(row)
            path = measure.write_seconds(place.results, device, config, rows)
        update = "" if row.update is None else f", {row.update:.3f} in a step that rewires"
        say_on_stderr(f"{label}: {row.ordinary:.3f} s a step{update}")
    print(f"written: {path}")
    return 0


def write_page(arguments: argparse.Namespace) -> int:
    """Write the page and its pictures."""
    for line in page.write(Path(arguments.write), place_of(arguments)):
        print(line)
    return 0


def say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    shared.add_argument("--out", default="runs/reproduction", metavar="FOLDER", help="where runs work (%(default)s)")
    shared.add_argument("--results", default="results", metavar="FOLDER", help="where results go (%(default)s)")
    which = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    default = Recipe()
    which.add_argument("--scaled", action="store_true", help="the small runs, for a CPU")
    which.add_argument("--only", nargs="+", metavar="GLOB", help="only runs with such names: '45k-rigl-*-seed0'")
    which.add_argument(
        "--nesterov",
        action=argparse.BooleanOptionalAction,
        default=default.nesterov,
        help="Nesterov momentum, as the report's code has it (the text does not say; default: yes)",
    )
    which.add_argument(
        "--dropout",
        type=float,
        default=default.dropout,
        metavar="X",
        help="inside the blocks, as the report's code has it (the text does not say; %(default)s)",
    )
    which.add_argument(
        "--stop-step",
        type=int,
        default=default.stop_step,
        metavar="N",
        help="masks stay from this step on (%(default)s; the report's code: 65918 with 45,000 images)",
    )
    which.add_argument(
        "--semantics", choices=list(PRESETS), default=default.semantics, help="docs/semantics.md (%(default)s)"
    )
    which.add_argument("--data-root", default="data", metavar="FOLDER", help="folder of the data (%(default)s)")
    which.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N (%(default)s)")
    which.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch")

    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    runner = commands.add_parser("run", parents=[shared, which], help="do a slice of the queue", allow_abbrev=False)
    runner.add_argument("--minutes", type=float, metavar="M", help="save and stop after so long (default: never)")
    runner.add_argument(
        "--jobs",
        default="auto",
        metavar="N",
        help="runs at a time; auto measures it once on an accelerator, and is 1 on a CPU (%(default)s)",
    )
    runner.add_argument("--list", action="store_true", help="as status")
    runner.set_defaults(run=run)
    lister = commands.add_parser("status", parents=[shared, which], help="list the queue", allow_abbrev=False)
    lister.set_defaults(run=status)
    timer = commands.add_parser(
        "time", parents=[shared, which], help="measure seconds of a step of every method", allow_abbrev=False
    )
    timer.add_argument("--steps", type=int, default=20, metavar="N", help="steps of each (%(default)s)")
    timer.set_defaults(run=time_methods)
    writer = commands.add_parser("page", parents=[shared], help="write the page", allow_abbrev=False)
    writer.add_argument("--write", default="docs/reproduction.md", metavar="FILE.md", help="(%(default)s)")
    writer.set_defaults(run=write_page)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except FxSparseError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"reproduce: {error or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
