"""Objects of the user's classes that forward returns or hands on: a cache of keys and values, a result with fields.

A graph holds tensors and plain values. An object that keeps some of them in its attributes is taken apart here, and
a node puts another of its class together at every call.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from ..core.arguments import is_object
from .concrete_proxy import ConcreteProxy

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, FunctionType)


@dataclass(frozen=True)
class MakeObject:
    """The target of a node: an object of `cls` whose attributes are the node's keyword arguments and `constants`.

    `names` are those of all, in their order.

    `__init__` of the class is not called: it would be given arguments that nobody knows.
    """

    cls: type
    constants: tuple[tuple[str, Any], ...]
    names: tuple[str, ...]

    @property
    def __name__(self) -> str:
        return f"make_{self.cls.__name__}"

    def __call__(self, /, **attributes: Any) -> Any:
        made: Any = object.__new__(self.cls)
        values = attributes | dict(self.constants)
        made.__dict__.update({name: values[name] for name in self.names})
        return made


def may_make(value: Any) -> bool:
    """Whether `value` is an object of ordinary attributes only."""
    has_slots = any(base.__dict__.get("__slots__") for base in type(value).__mro__)
    return is_object(value) and not has_slots


def take_apart(value: Any, create_arg: Callable[[Any], Any]) -> tuple[Callable, tuple, dict[str, Any]]:
    """The call `(target, args, kwargs)` that makes an object like `value`; `create_arg` makes its arguments."""
    constants = {
        name: item
        for name, item in vars(value).items()
        if type(item) is not ConcreteProxy and isinstance(item, _PLAIN)  # to which a proxy of a number is one, too
    }
    rest = {name: create_arg(item) for name, item in vars(value).items() if name not in constants}
    return MakeObject(type(value), tuple(constants.items()), tuple(vars(value))), (), rest


def construction(value: dict, create_arg: Callable) -> tuple[Callable, tuple, dict]:
    """The call that makes an instance of a subclass of dict: an OrderedDict, or an output class with fields."""
    if dataclasses.is_dataclass(value):
        return type(value), (), {name: create_arg(item) for name, item in vars(value).items()}
    if isinstance(value, defaultdict):
        return type(value), (create_arg(value.default_factory), create_arg(dict(value))), {}
    return type(value), (create_arg(dict(value)),), {}
