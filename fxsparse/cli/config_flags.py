"""The options of `TrainConfig` as flags: for every command that trains."""

from __future__ import annotations

import argparse
import json
from collections.abc import Container, Mapping
from typing import Any

from fxsparse.cli.key_values import key_values
from fxsparse.training.config import HEADINGS, config_options, shown
from fxsparse.training.options import Option
from fxsparse.training.recipes import RECIPES, recipe_for


def add_config_flags(parser: Any, without: Container[str] = (), defaults: Mapping[str, str] | None = None) -> None:
    """Add a flag for each option, under the headings of `TrainConfig`, except those named in `without`.

    `defaults` are words for defaults that the command has of its own.
    """
    group: Any = parser
    for name, option in config_options().items():
        if name in HEADINGS:
            group = parser.add_argument_group(HEADINGS[name])
        if name not in without:
            own = (defaults or {}).get(name)
            _add_flag(group, option, _default_text(option) if own is None else f" (default: {own})")


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that stood on the command line, by name."""
    return {name: value for name, value in vars(arguments).items() if name in config_options()}


def as_flags(given: Mapping[str, Any]) -> list[str]:
    """The words of a command line that give these options."""
    words = []
    for name, value in given.items():
        flag = config_options()[name].flag
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        elif isinstance(value, Mapping):
            pairs = {key: each if isinstance(each, str) else json.dumps(each) for key, each in value.items()}
            words += [flag, *(f"{key}={each}" for key, each in pairs.items())]
        else:
            words += [flag, *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    return words


def _add_flag(group: Any, option: Option, default: str) -> None:
    """One option as a flag; without it the parsed arguments have no such attribute."""
    more: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS}
    more["help"] = f"{option.help}{default}".replace("%", "%%")
    if option.kind is bool:
        group.add_argument(option.flag, action=argparse.BooleanOptionalAction, **more)
    elif option.kind is dict:
        group.add_argument(option.flag, action=_KeyValues, nargs="+", metavar="KEY=VALUE", **more)
    else:
        if option.many:
            more["nargs"] = "+"
        more["metavar"] = {int: "N", float: "X", str: "NAME"}[option.kind]
        if option.alone is not None:
            more |= {"nargs": "?", "const": option.alone}
            off = {"dest": option.name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            group.add_argument(f"--no-{option.flag[2:]}", action="store_const", const=option.default, **off)
        if option.choices is not None:
            choices = option.choices() if callable(option.choices) else option.choices
            more["metavar"] = "{" + ",".join(choices) + "}"
        group.add_argument(option.flag, type=option.kind, **more)


class _KeyValues(argparse.Action):
    """`KEY=VALUE ...` as a dict, added to what an earlier flag of the name gave."""

    def __call__(self, parser: Any, namespace: Any, values: Any, flag: str | None = None) -> None:
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), **key_values(values, str(flag))})


def _default_text(option: Option) -> str:
    """` (default: ...)` for `--help`, data set by data set (or optimizer) where it depends on that."""
    if option.default is not None:
        return f" (default: {_written(option.default)})" if option.default not in ((), {}) else ""
    if option.name in ("lr", "weight_decay"):
        values = {name: recipe_for("digits", name)[option.name] for name in ("sgd", "adam", "adamw")}
        values["adam on text"] = recipe_for("text", "adam")[option.name]
    else:
        values = {name: recipe[option.name] for name, recipe in RECIPES.items() if option.name in recipe}
    groups: dict[Any, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    described = [f"{_written(value)} for {', '.join(names)}" for value, names in groups.items()]
    return f" (default: {'; '.join(described)})" if described else ""


def _written(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else shown(value)
