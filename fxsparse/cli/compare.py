"""`fxsparse compare`: methods x sparsities x distributions x seeds, and one table of them all."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fxsparse.core.errors import ConfigError
from fxsparse.studies import table_pictures
from fxsparse.studies.comparison import Comparison, read_comparison
from fxsparse.studies.execution import States, execute, read_states
from fxsparse.studies.plan import PlannedRun, make_plan
from fxsparse.studies.run_state import DIVERGED, FAILED, FINISHED
from fxsparse.studies.table import make_table
from fxsparse.studies.table_formats import About, to_csv, to_markdown
from fxsparse.training.checkpoint import write_atomically
from fxsparse.training.locks import held

RUN_FAILED = 1
UNFINISHED = 3

EXAMPLES = """examples:
  fxsparse compare digits.yaml                              everything about it goes to runs/digits
  fxsparse compare digits.yaml --list                       the plan, and what of it is done
  fxsparse compare digits.yaml --limit-minutes 50 --jobs 2  the same command goes on where it stopped
  fxsparse compare digits.yaml --table docs/digits.md       and docs/digits.csv, docs/digits.png

digits.yaml:
  options: {data: digits, model_options: {width: 4}, steps: 2000, threads: 1}
  methods: [dense, static, set, rigl, {method: rigl, extend: 2, label: RigL 2x}, lottery]
  sparsities: [0.9, 0.95]
  distributions: [uniform, erk]
  seeds: [0, 1, 2]

exit codes: 0 complete, 1 a run failed, 2 wrong use, 3 stopped before the end, 130 Ctrl-C
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "compare",
        help="train and compare methods over sparsities, distributions and seeds",
        description=(
            "Train every combination that CONFIG.yaml lists, and write one table of accuracies and FLOPs. The same "
            "command goes on where it was stopped; what is finished is not trained again."
        ),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("config", metavar="CONFIG.yaml", help="what to compare: see below")
    parser.add_argument("--out", metavar="FOLDER", help="where runs and tables go (default: runs/ and the file's name)")
    parser.add_argument(
        "--table", metavar="FILE.md", help="the table; .csv and .png beside it (default: comparison.md in --out)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--limit-minutes", type=float, metavar="M", help="save and stop after so long")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="list the runs and how far they are, train nothing")
    only.add_argument("--table-only", action="store_true", help="write the table of what is finished, train nothing")


def run(arguments: argparse.Namespace) -> int:
    """List, train, write the table; the exit code."""
    if arguments.jobs < 1:
        raise ConfigError(f"--jobs is {arguments.jobs}; it must be 1 or more")
    if arguments.limit_minutes is not None and not arguments.limit_minutes > 0:
        raise ConfigError(f"--limit-minutes is {arguments.limit_minutes:g}; it must be above 0")
    comparison = read_comparison(arguments.config)
    out = Path(arguments.out or Path("runs") / Path(arguments.config).stem)
    target = Path(arguments.table or out / "comparison.md")
    if target.suffix != ".md":
        raise ConfigError(f"--table {target} is no .md file")
    runs = make_plan(comparison, out)
    states = read_states(runs)
    if arguments.list:
        print(_listed(runs, states))
        return 0
    complete = True
    if not arguments.table_only:
        with held(out / ".lock") as is_ours:
            if not is_ours:
                raise ConfigError(f"another process is at work in {out}; wait for it, or choose another --out")
            complete = _train(runs, arguments, out, target, comparison)
    states = read_states(runs)
    for line in _write_table(comparison, runs, states, arguments, target):
        print(line)
    if not complete:
        print(f"fxsparse: stopped by --limit-minutes, {_how_to_go_on(arguments, states)}", file=sys.stderr)
        return UNFINISHED
    failed = sum(states[each.folder].word in (FAILED, DIVERGED) for each in runs)
    if failed:
        print(f"fxsparse: {failed} of {len(runs)} runs failed; see {target}", file=sys.stderr)
        return RUN_FAILED
    return 0 if arguments.table_only or all(state.word == FINISHED for state in states.values()) else UNFINISHED


def _train(
    runs: Sequence[PlannedRun], arguments: argparse.Namespace, out: Path, target: Path, comparison: Comparison
) -> bool:
    """Do the runs that are left; whether the time was enough for them. Ctrl-C still writes the table."""
    progress = not arguments.no_progress and sys.stderr.isatty()
    try:
        return execute(
            runs,
            jobs=arguments.jobs,
            limit_minutes=arguments.limit_minutes,
            progress=progress,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except KeyboardInterrupt:
        states = read_states(runs)
        _write_table(comparison, runs, states, arguments, target)
        raise KeyboardInterrupt(f"interrupted, {_how_to_go_on(arguments, states)}") from None


def _how_to_go_on(arguments: argparse.Namespace, states: States) -> str:
    done = sum(state.word == FINISHED for state in states.values())
    return f"{done} of {len(states)} runs finished; continue with: {_command(arguments, with_jobs=True)}"


def _write_table(
    comparison: Comparison, runs: Sequence[PlannedRun], states: States, arguments: argparse.Namespace, target: Path
) -> list[str]:
    """Write Markdown, CSV and the picture of what is finished; lines that say where they are."""
    table = make_table(runs, states, comparison.group_factor)
    picture, figures = target.with_suffix(".png"), target.with_suffix(".csv")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"could not write to {target.parent}: {error.strerror or error}") from error
    drawn = table_pictures.draw_or_explain(table, picture, comparison.title) if table.results else "no picture yet"
    about = About(
        comparison,
        runs,
        _command(arguments),
        failures=[
            f"{each.name} {states[each.folder].word}: {states[each.folder].error}"
            for each in runs
            if states[each.folder].word in (FAILED, DIVERGED)
        ],
        picture=picture.name if drawn.startswith("picture:") else None,
    )
    write_atomically(target, to_markdown(table, about).encode())
    write_atomically(figures, to_csv(table).encode())
    return [f"table: {target}, {figures}", drawn]


def _command(arguments: argparse.Namespace, with_jobs: bool = False) -> str:
    """This command again, with the flags that the result depends on."""
    words = ["fxsparse", "compare", arguments.config]
    for flag, value in (("--out", arguments.out), ("--table", arguments.table)):
        words += [flag, value] if value is not None else []
    if with_jobs and arguments.jobs > 1:
        words += ["--jobs", str(arguments.jobs)]
    if with_jobs and arguments.limit_minutes is not None:
        words += ["--limit-minutes", f"{arguments.limit_minutes:g}"]
    return shlex.join(words)


def _listed(runs: Sequence[PlannedRun], states: States) -> str:
    """The plan as a table: what is run, how far it is, what it needs."""
    rows = []
    for each in runs:
        state = states[each.folder]
        so_far = (
            f"{state.result.score:.4f}" if state.result else state.error or (f"step {state.step}" if state.step else "")
        )
        needs = ", ".join(folder.name for folder in each.needs)
        rows.append(
            [each.row.label, each.config.method, each.sparsity, each.distribution, each.seed, state.word, so_far, needs]
        )
    headers = ["row", "method", "sparsity", "distribution", "seed", "state", "", "needs"]
    done = sum(state.word == FINISHED for state in states.values())
    table = tabulate(rows, headers, tablefmt="simple", missingval="-", disable_numparse=True)
    return f"{table}\n{done} of {len(runs)} runs finished"
