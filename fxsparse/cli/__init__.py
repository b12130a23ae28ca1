"""The command line: `fxsparse train`, `compare`, `tune`, `data`, `flops`.

Every subcommand is a module with `add_parser(subparsers)`; the function that it sets as `run` takes the
parsed arguments and returns the exit code. What the user got wrong is one line on stderr and exit code 2,
Ctrl-C is 130; a traceback is a defect.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from tqdm import tqdm

from fxsparse.core.errors import ConfigError, FxSparseError, FxSparseWarning

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
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)
            arguments = _make_parser().parse_args(argv)
            return arguments.run(arguments)
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    except FxSparseError as error:
        return _complain(error)
    except torch.OutOfMemoryError as error:
        return _complain(f"out of memory; try a smaller --batch-size ({error})")
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as interrupt:
        print(f"fxsparse: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED


def _complain(error: object) -> int:
    print(f"fxsparse: error: {' '.join(str(error).split())}", file=sys.stderr)
    return USER_ERROR


def _show_warning(otherwise: Callable, message: Warning, category: type, *place: Any, **more: Any) -> None:
    """A warning of ours as one line above the progress bar; any other as ever."""
    if issubclass(category, FxSparseWarning):
        tqdm.write(f"fxsparse: warning: {message}", file=sys.stderr)
    else:
        otherwise(message, category, *place, **more)


def _make_parser() -> argparse.ArgumentParser:
    import fxsparse
    from fxsparse.cli import compare, data, flops, train, tune

    parser = _Parser(prog="fxsparse", description="A graph compiler for sparse training in PyTorch.")
    parser.add_argument("--version", action="version", version=f"fxsparse {fxsparse.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (train, compare, tune, data, flops):
        command.add_parser(subparsers)
    return parser
