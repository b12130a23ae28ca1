"""`fxsparse train`: train a sparse network on real data, or go on with a run.

The flags are the options of `TrainConfig`, one for one; what is said of them here is only how they are
written on a command line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fxsparse.core.errors import ConfigError
from fxsparse.training import continue_run, train
from fxsparse.training.config import HEADINGS, TrainConfig, config_options, shown
from fxsparse.training.options import Option
from fxsparse.training.recipes import RECIPES, recipe_for

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
    group: Any = parser
    for name, option in config_options().items():
        if name in HEADINGS:
            group = parser.add_argument_group(HEADINGS[name])
        _add_flag(group, option)


def run(arguments: argparse.Namespace) -> int:
    """Train, or resume; the exit code."""
    given = {name: value for name, value in vars(arguments).items() if name in config_options()}
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


def _add_flag(group: Any, option: Option) -> None:
    """One option as a flag; without it the parsed arguments have no such attribute."""
    more: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS}
    more["help"] = f"{option.help}{_default_text(option)}".replace("%", "%%")
    if option.kind is bool:
        group.add_argument(option.flag, action=argparse.BooleanOptionalAction, **more)
    elif option.kind is dict:
        group.add_argument(option.flag, action=_KeyValues, nargs="+", metavar="KEY=VALUE", **more)
    else:
        if option.many:
            more["nargs"] = "+"
        more["metavar"] = {int: "N", float: "X", str: "NAME"}[option.kind]
        if option.choices is not None:
            choices = option.choices() if callable(option.choices) else option.choices
            more["metavar"] = "{" + ",".join(choices) + "}"
        group.add_argument(option.flag, type=option.kind, **more)


class _KeyValues(argparse.Action):
    """`KEY=VALUE ...` as a dict; a value is read as JSON where it is JSON, else as text."""

    def __call__(self, parser: Any, namespace: Any, values: Any, flag: str | None = None) -> None:
        pairs = dict(getattr(namespace, self.dest, {}))
        for text in values:
            key, equals, value = text.partition("=")
            if not (key and equals):
                raise ConfigError(f"{flag} {text!r} is not of the form KEY=VALUE")
            try:
                pairs[key] = json.loads(value)
            except json.JSONDecodeError:
                pairs[key] = value
        setattr(namespace, self.dest, pairs)


def _default_text(option: Option) -> str:
    """` (default: ...)` for `--help`, data set by data set (or optimizer) where it depends on that."""
    if option.default is not None:
        return f" (default: {_written(option.default)})" if option.default not in ((), {}) else ""
    if option.name in ("lr", "weight_decay"):
        values = {name: recipe_for("digits", name)[option.name] for name in ("sgd", "adam", "adamw")}
    else:
        values = {name: recipe[option.name] for name, recipe in RECIPES.items() if option.name in recipe}
    groups: dict[Any, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    described = [f"{_written(value)} for {', '.join(names)}" for value, names in groups.items()]
    return f" (default: {'; '.join(described)})" if described else ""


def _written(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else shown(value)
