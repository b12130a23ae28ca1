"""`fxsparse train`: train a sparse network on real data, or go on with a run.

The flags are the options of `TrainConfig`, one for one; what is said of them here is only how they are
written on a command line.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fxsparse.cli.config_flags import add_config_flags, given_options
from fxsparse.training import continue_run, train
from fxsparse.training.config import TrainConfig

EXAMPLES = """examples:
  fxsparse train                                  digits, RigL at 90%: under a minute
  fxsparse train --data cifar10 --sparsity 0.95 --distribution uniform
  fxsparse train --data cifar10 --method static --steps 400 --out runs/static
  fxsparse train --resume runs/static             after Ctrl-C, a kill or a power cut
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "train",
        help="train a sparse network on real data",
        description="Train a sparse network on real data. Everything about the run goes to its folder.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="fxsparse train [options]",
    )
    parser.set_defaults(run=run)
    folder = parser.add_argument_group("run folder")
    folder.add_argument(
        "--out", metavar="FOLDER", help="the run's folder (default: runs/ and a name made of the options)"
    )
    folder.add_argument("--resume", metavar="PATH", help="go on with the run in this folder, or from this checkpoint")
    folder.add_argument("--no-progress", action="store_true", help="no progress bar")
    add_config_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train, or resume; the exit code."""
    given = given_options(arguments)
    progress = not arguments.no_progress
    if arguments.resume is not None:
        continue_run(arguments.resume, arguments.out, changes=given, progress=progress)
    else:
        config = TrainConfig(**given).resolved()
        train(config, arguments.out or default_folder(config), progress=progress)
    return 0


def default_folder(config: TrainConfig) -> Path:
    """`runs/DATA-MODEL-METHOD-SPARSITY-seedN`, or `flopsBUDGET` in place of the sparsity."""
    kind, _, place = config.data.partition(":")
    parts = [
        kind,
        Path(place).name,
        config.model,
        config.method,
        f"{config.sparsity:g}" if config.sparsity is not None else f"flops{config.flops:g}",
        f"seed{config.seed}",
    ]
    return Path("runs") / "-".join(part for part in parts if part)
