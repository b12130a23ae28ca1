"""The command line: `fxsparse train`, `fxsparse data`.

Every subcommand is a module with `add_parser(subparsers)`; the function that it sets as `run` takes the
parsed arguments and returns the exit code. What the user got wrong is one line on stderr and exit code 2,
Ctrl-C is 130; a traceback is a defect.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from fxsparse.core.errors import ConfigError, FxSparseError

USER_ERROR = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are errors of ours, in one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (by default the process's) and return its exit code."""
    import torch

    try:
        arguments = _make_parser().parse_args(argv)
        return arguments.run(arguments)
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    except FxSparseError as error:
        return _complain(error)
    except torch.OutOfMemoryError as error:
        return _complain(f"out of memory; try a smaller --batch-size ({error})")
    except KeyboardInterrupt as interrupt:
        print(f"fxsparse: {interrupt or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED


def _complain(error: object) -> int:
    print(f"fxsparse: error: {' '.join(str(error).split())}", file=sys.stderr)
    return USER_ERROR


def _make_parser() -> argparse.ArgumentParser:
    import fxsparse
    from fxsparse.cli import data, train

    parser = _Parser(prog="fxsparse", description="A graph compiler for sparse training in PyTorch.")
    parser.add_argument("--version", action="version", version=f"fxsparse {fxsparse.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (train, data):
        command.add_parser(subparsers)
    return parser
