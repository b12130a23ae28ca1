"""How one option is described, once, for the configuration, its checks and the command line."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any

from fxsparse.core.errors import ConfigError, nearest

Choices = Sequence[str] | Callable[[], Iterable[str]]


@dataclass(frozen=True)
class Option:
    """What there is to know of one option. Its kind is read off the field's annotation.

    kind: `int`, `float`, `str`, `bool` or `dict` (KEY=VALUE pairs); `many`: a tuple of them.
    optional: None is allowed, and means that something else decides.
    within: the interval it must lie in, as mathematics writes it: `"[0, 1)"`, `"(0, inf)"`.
    choices: the names it may take, or a function that gives them.
    canonical: a function from a name as it was given to the name that is kept.
    spellings: whether `canonical` also takes what is no text (a list in a configuration file).
    alone: what the flag without a value means; `--no-` before it then takes back to the default.
    changeable: may differ when a run is resumed, because the result does not depend on it.
    """

    name: str
    default: Any
    kind: type
    many: bool
    optional: bool
    help: str
    within: str | None = None
    choices: Choices | None = None
    canonical: Callable[[Any], str] | None = None
    spellings: bool = False
    alone: str | None = None
    changeable: bool = False

    @property
    def flag(self) -> str:
        """How the option is written on the command line."""
        return "--" + self.name.replace("_", "-")

    def check(self, value: Any) -> Any:
        """`value` as the configuration keeps it; `ConfigError` in one line if the option cannot take it."""
        if value is None and self.optional:
            return None
        if self.kind is dict:
            if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
                raise ConfigError(f"{self.name} is {value!r}; it takes KEY=VALUE pairs")
            return dict(value)
        if self.many:
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ConfigError(f"{self.name} is {value!r}; it takes a list")
            return tuple(self._check_one(each) for each in value)
        return self._check_one(value)

    def _check_one(self, value: Any) -> Any:
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if self.spellings and self.canonical is not None:
            value = self.canonical(value)
        fits = isinstance(value, self.kind) and not (self.kind is int and isinstance(value, bool))
        if not fits:
            raise ConfigError(f"{self.name} is {value!r}; it takes {_KINDS[self.kind]}")
        if self.canonical is not None:
            value = self.canonical(value)
        if self.within is not None and not _inside(value, self.within):
            raise ConfigError(f"{self.name} is {value}; it must be in {self.within}")
        if self.choices is not None:
            check_choice(self.name, value, self.choices() if callable(self.choices) else self.choices)
        return value


def option(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field that carries the rest of its `Option`."""
    return field(default=default, metadata={"help": help, **more})


def options_of(config_class: type) -> dict[str, Option]:
    """The options of a dataclass whose fields were made by `option`, by name and in order."""
    hints = typing.get_type_hints(config_class)
    return {
        entry.name: Option(
            name=entry.name,
            default={} if callable(entry.default_factory) else entry.default,
            **_read_annotation(hints[entry.name]),
            **entry.metadata,
        )
        for entry in fields(config_class)
    }


def _read_annotation(hint: Any) -> dict[str, Any]:
    """`kind`, `many` and `optional` from `int`, `int | None`, `tuple[str, ...]`, `dict[str, Any]`."""
    optional = NoneType in typing.get_args(hint)
    if optional:
        (hint,) = (part for part in typing.get_args(hint) if part is not NoneType)
    many = typing.get_origin(hint) is tuple
    if many:
        hint = typing.get_args(hint)[0]
    return {"kind": typing.get_origin(hint) or hint, "many": many, "optional": optional}


_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """`ConfigError` that lists the choices if `value` is none of them."""
    choices = list(choices)
    if value not in choices:
        raise ConfigError(f"unknown {name} {value!r}{nearest(str(value), choices)}; choices: {', '.join(choices)}")


def _inside(value: float, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below
