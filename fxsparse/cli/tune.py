"""`fxsparse tune`: search the drop fraction, the update interval and the learning rate on validation data."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fxsparse.cli.config_flags import add_config_flags, as_flags, given_options
from fxsparse.core.errors import ConfigError
from fxsparse.studies.stopping import stopped_after
from fxsparse.training import TrainConfig, data
from fxsparse.training.checkpoint import write_atomically
from fxsparse.training.config import shown

TRIALS = 15  # the report's
VALIDATION_SHARE = 0.1  # the report's 5,000 of 50,000
RUN_FAILED = 1
UNFINISHED = 3
SEARCHED = ("drop_fraction", "update_interval")

EXAMPLES = """examples:
  fxsparse tune --data cifar10 --sparsity 0.9 --distribution erk --seeds 0 1 2
  fxsparse tune --steps 500 --interval-range 10 100 10 --trials 20 --out runs/tune
  fxsparse tune --steps 500 --interval-range 10 100 10 --trials 20 --out runs/tune   # a second process helps
  fxsparse tune --method set --tune-lr

The same command goes on where it was stopped. Trials are ordinary run folders, below --out.
exit codes: 0 complete, 1 a run failed, 2 wrong use, 3 stopped by --limit-minutes, 130 Ctrl-C
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "tune",
        help="search drop fraction, update interval and learning rate",
        description=(
            "Search the drop fraction (alpha), the update interval (delta_t) and perhaps the learning rate with "
            "Optuna's TPE sampler, by the score on a held-out part of the training data. Other options are those "
            "of fxsparse train."
        ),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="fxsparse tune [options]",
    )
    parser.set_defaults(run=run)
    search = parser.add_argument_group("search")
    search.add_argument("--out", metavar="FOLDER", help="where trials and tables go (default: runs/tune-...)")
    search.add_argument(
        "--trials", type=int, default=TRIALS, metavar="N", help="trials of the study in all (default: %(default)s)"
    )
    search.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        metavar="N",
        help="seeds that a trial's score is a mean of (default: 0)",
    )
    search.add_argument(
        "--alpha-range", type=float, nargs=2, default=[0.1, 0.6], metavar=("LOW", "HIGH"), help="(default: 0.1 0.6)"
    )
    search.add_argument(
        "--interval-range",
        type=int,
        nargs=3,
        default=[50, 1000, 50],
        metavar=("LOW", "HIGH", "STEP"),
        help="in optimizer steps (default: 50 1000 50)",
    )
    search.add_argument("--tune-lr", action="store_true", help="search the learning rate too")
    search.add_argument(
        "--lr-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="(default: a 20th of the learning rate, to it)"
    )
    search.add_argument("--sampler-seed", type=int, default=0, metavar="N", help="seed of the sampler (default: 0)")
    search.add_argument("--storage", metavar="URL", help="where trials are kept (default: trials.sqlite3 in --out)")
    search.add_argument("--study", metavar="NAME", help="the study's name in it (default: the name of --out)")
    search.add_argument("--limit-minutes", type=float, metavar="M", help="save and stop after so long")
    search.add_argument("--table-only", action="store_true", help="write the table of what is finished, train nothing")
    search.add_argument("--no-progress", action="store_true", help="no progress bar")
    add_config_flags(parser, without=("seed", *SEARCHED), defaults={"validation": "a tenth of them"})


def run(arguments: argparse.Namespace) -> int:
    """Search, write the table; the exit code."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ConfigError("fxsparse tune needs Optuna: pip install 'fxsparse[tune]'") from None
    from fxsparse.studies.search import failed_runs, metric_of, open_search, run_trials

    if arguments.trials < 1:
        raise ConfigError(f"--trials is {arguments.trials}; it must be 1 or more")
    if arguments.limit_minutes is not None and not arguments.limit_minutes > 0:
        raise ConfigError(f"--limit-minutes is {arguments.limit_minutes:g}; it must be above 0")
    if len(set(arguments.seeds)) < len(arguments.seeds) or min(arguments.seeds) < 0:
        raise ConfigError(f"--seeds {shlex.join(map(str, arguments.seeds))}: they must be different and 0 or more")
    given = given_options(arguments)
    config = _with_validation(TrainConfig(**{"plots": False, "tensorboard": False} | given).resolved(), given)
    space = _space(arguments, config)
    out = Path(arguments.out or _default_folder(config))
    search = open_search(
        config,
        space,
        arguments.seeds,
        metric_of(config.data),
        out,
        arguments.storage or f"sqlite:///{out / 'trials.sqlite3'}",
        arguments.study or out.name,
        arguments.sampler_seed,
    )
    in_time = True
    if not arguments.table_only:
        with stopped_after(arguments.limit_minutes) as limit:
            try:
                run_trials(
                    search,
                    arguments.trials,
                    progress=not arguments.no_progress and sys.stderr.isatty(),
                    say=lambda line: print(line, file=sys.stderr, flush=True),
                )
            except KeyboardInterrupt:
                if not limit.passed:
                    _write(search, arguments, out)
                    raise KeyboardInterrupt("interrupted; the same command goes on with the trial") from None
                in_time = False
    for line in _write(search, arguments, out):
        print(line)
    if not in_time:
        print("fxsparse: stopped by --limit-minutes; the same command goes on with the trial", file=sys.stderr)
        return UNFINISHED
    failed = failed_runs(search)
    for line in failed:
        print(f"fxsparse: {line}", file=sys.stderr)
    return RUN_FAILED if failed else 0


def _with_validation(config: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    """The configuration with a part of the training data held out: the search must not see the test part.

    Raises:
        ConfigError: the data set's options leave no such part.
    """
    if data.is_text(config.data):
        if config.split is None or config.split[1] == 0:
            raise ConfigError(
                f"--split {shown(config.split)} leaves nothing to search by; its second share must be above 0"
            )
        return config
    if config.validation:
        return config
    if "validation" in given:
        raise ConfigError("--validation is 0: there must be images to search by; leave it out for a tenth")
    images = len(data.load(config.data, config.data_root, image_size=config.image_size).train)
    return replace(config, validation=max(1, round(VALIDATION_SHARE * images)))


def _space(arguments: argparse.Namespace, config: TrainConfig) -> Any:
    """The ranges that the flags give, checked.

    Raises:
        ConfigError: a range is empty or outside of what the option may be, or there is nothing to search.
    """
    from fxsparse.runtime.methods import make_method
    from fxsparse.runtime.schedule import PruningSchedule, UpdateSchedule
    from fxsparse.studies.search import Space

    low, high = arguments.alpha_range
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"--alpha-range {low:g} {high:g} is not a range in [0, 1]")
    first, last, step = arguments.interval_range
    if not (1 <= first <= last and step >= 1):
        raise ConfigError(f"--interval-range {first} {last} {step} is not a range from 1 on, and a step")
    if config.steps is not None and first >= config.steps:
        raise ConfigError(f"--interval-range {first} {last} {step}: a run of {config.steps} steps never rewires")
    last -= (last - first) % step
    rates = None
    if arguments.lr_range is not None and not arguments.tune_lr:
        raise ConfigError("--lr-range goes with --tune-lr")
    if arguments.tune_lr:
        assert config.lr is not None
        slow, fast = arguments.lr_range or (config.lr / 20, config.lr)
        if not 0 < slow <= fast:
            raise ConfigError(f"--lr-range {slow:g} {fast:g} is not a range above 0")
        rates = (slow, fast)
    method = make_method(config.method)
    schedule = method.schedule(UpdateSchedule(100, 750.0, 0.3), 1000)
    if method.rewires and isinstance(schedule, UpdateSchedule | PruningSchedule):
        return Space((low, high) if method.grows else None, (first, last, step), rates)
    if rates is None:
        raise ConfigError(
            f"method {config.method} has no drop fraction and no update interval: there is nothing to search without "
            "--tune-lr"
        )
    return Space(None, None, rates)


def _default_folder(config: TrainConfig) -> Path:
    from fxsparse.cli.train import default_folder

    name = default_folder(config).name.removesuffix(f"-seed{config.seed}")
    return Path("runs") / f"tune-{name}-{config.distribution}"


def _write(search: Any, arguments: argparse.Namespace, out: Path) -> list[str]:
    """Write Markdown, CSV and the contour; lines that say where they are, and which trial is best."""
    from fxsparse.studies.search_report import best_row, draw_contour, to_csv, to_markdown, trial_rows

    rows = trial_rows(search)
    picture = out / "contour.png"
    drawn = draw_contour(search, rows, picture)
    text = to_markdown(search, rows, _command(arguments), picture.name if drawn else None)
    write_atomically(out / "trials.md", text.encode())
    write_atomically(out / "trials.csv", to_csv(search, rows).encode())
    lines = [f"table: {out / 'trials.md'}, {out / 'trials.csv'}", *([f"picture: {picture}"] if drawn else [])]
    best = best_row(search, rows)
    if best is not None:
        flags = " ".join(f"--{name.replace('_', '-')} {value:.6g}" for name, value in best.options.items())
        lines.append(f"best: trial {best.number}, validation {search.metric.name} {best.score:.4f}: {flags}")
    return lines


def _command(arguments: argparse.Namespace) -> str:
    """This command again, with the flags that the trials depend on."""
    words = ["fxsparse", "tune", *as_flags(given_options(arguments))]
    words += ["--seeds", *map(str, arguments.seeds), "--trials", str(arguments.trials)]
    words += ["--alpha-range", *map(str, arguments.alpha_range)]
    words += ["--interval-range", *map(str, arguments.interval_range)]
    words += ["--tune-lr"] if arguments.tune_lr else []
    words += ["--lr-range", *map(str, arguments.lr_range)] if arguments.lr_range else []
    words += ["--sampler-seed", str(arguments.sampler_seed)]
    words += ["--out", arguments.out] if arguments.out else []
    return shlex.join(words)
