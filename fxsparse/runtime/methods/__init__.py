"""The methods by name. A new one is a file here and an entry in the table."""

import dataclasses
from typing import Any

from ...core.errors import ConfigError, nearest
from ..semantics import METHOD_DEFAULTS
from .base import Method, Moment, Need, Pattern, Quota
from .deepr import DeepR
from .dsr import DSR
from .lottery import Lottery
from .pruning import Pruning
from .rigl import RigL, RigLSG, RigLSM, RigLStruct
from .set import SET
from .snfs import SNFS
from .snip import SNIP
from .static import Dense, SmallDense, Static

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        Dense,
        SmallDense,
        Static,
        SNIP,
        SET,
        RigL,
        RigLStruct,
        SNFS,
        RigLSG,
        RigLSM,
        DSR,
        DeepR,
        Pruning,
        Lottery,
    )
}


def methods() -> list[str]:
    """The names that `sparsify(..., method=...)` accepts."""
    return list(METHODS)


def make_method(method: str | Method, defaults: str = "paper", **options: Any) -> Method:
    """A method from its name and options, or the method itself.

    Args:
        defaults: the preset of `semantics` whose options the method has unless `options` say otherwise.

    Raises:
        ConfigError: an unknown name or option, or a value that the option cannot have.
    """
    if isinstance(method, Method):
        if options:
            raise ConfigError(f"{next(iter(options))}: give it to {type(method).__name__}(...), which was made already")
        kind = type(method)
        if method.grows and kind.grow_score is Method.grow_score and kind.new_patterns is Method.new_patterns:
            raise ConfigError(f"method: {kind.__name__} grows connections; give it a grow_score, or new_patterns")
        return method
    if not isinstance(method, str) or method not in METHODS:
        raise ConfigError(f"method: {method!r} is not one of {', '.join(METHODS)}{nearest(str(method), METHODS)}")
    known = method_options(method)
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ConfigError(f"method {method} takes no option {option!r}; {takes}{nearest(option, known)}")
    return METHODS[method](**METHOD_DEFAULTS.get(defaults, {}).get(method, {}) | options)


def method_options(method: str) -> dict[str, Any]:
    """The options of the method of that name, and their defaults."""
    return {entry.name: entry.default for entry in dataclasses.fields(METHODS[method]) if entry.init}


__all__ = [
    "DSR",
    "METHODS",
    "SET",
    "SNFS",
    "SNIP",
    "DeepR",
    "Dense",
    "Lottery",
    "Method",
    "Moment",
    "Need",
    "Pattern",
    "Pruning",
    "Quota",
    "RigL",
    "RigLSG",
    "RigLSM",
    "SmallDense",
    "Static",
    "make_method",
    "method_options",
    "methods",
]
