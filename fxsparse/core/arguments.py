"""What a graph took as constant from its example, and the nodes that check it at every call.

A graph is captured for one example. Tensors stay free but for their number of dimensions, which forward may ask
for; a flag, a number, `None`, or the keys of a dict are baked in, so a later call must bring the same ones. So are
decisions on sizes (`if x.shape[0] > 4`), so a later call must come to the same ones.
"""

import copy
import enum
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import InputError


def structure_of(value: Any) -> Any:
    """A plain description of an argument: `("tensor", rank)`, `("=", constant)`, or a container of descriptions."""
    if isinstance(value, Tensor):
        return ("tensor", value.dim())
    if isinstance(value, dict):
        return ("dict", {str(key): structure_of(item) for key, item in value.items()})
    if isinstance(value, (tuple, list)):
        return ("sequence", tuple(structure_of(item) for item in value))
    if _is_constant(value):
        return ("=", value)
    if is_object(value):
        tensors = {name: item.dim() for name, item in vars(value).items() if isinstance(item, Tensor)}
        return ("object", (type(value).__name__, tensors))
    return ("type", type(value).__name__)


def without_ranks(structure: Any) -> Any:
    """A description of an argument (or a part of one) in which every tensor may have any number of dimensions."""
    if isinstance(structure, dict):
        return {key: without_ranks(item) for key, item in structure.items()}
    if not isinstance(structure, tuple) or structure[:1] == ("=",):
        return structure
    if structure[:1] == ("tensor",):
        return ("tensor", None)
    if structure[:1] == ("object",):
        return ("object", (structure[1][0], {}))
    return tuple(without_ranks(item) for item in structure)


def structure_is_constant(value: Any) -> bool:
    """Whether an argument holds no tensor, so that tracing may use it as it is."""
    if isinstance(value, (tuple, list)):
        return all(structure_is_constant(item) for item in value)
    if isinstance(value, dict):
        return all(structure_is_constant(item) for item in value.values())
    return _is_constant(value)


def is_object(value: Any) -> bool:
    """Whether `value` is an instance of a class of the user's, whose attributes may be anything at a call."""
    plain = (Tensor, torch.nn.Module, Mapping, tuple, list, enum.Enum, type)
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, plain)


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """A copy of `tree` with `function` of every leaf: inside containers, and inside objects, which are copied too."""
    copies: dict[int, Any] = {}

    def mapped(leaf: Any) -> Any:
        if not is_object(leaf):
            return function(leaf)
        if id(leaf) not in copies:
            copies[id(leaf)] = own = copy.copy(leaf)
            for name, item in vars(leaf).items():
                object.__setattr__(own, name, pytree.tree_map(mapped, item))
        return copies[id(leaf)]

    return pytree.tree_map(mapped, tree)


def _is_constant(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, enum.Enum, torch.dtype, torch.device))


def check_argument(value: Any, structure: Any, name: str) -> None:
    """A node at the head of a graph: the argument must be what the example had, where that was baked in.

    Raises:
        InputError: naming the argument, what it was for the example and what it is now.
    """
    kind, expected = structure
    if kind == "tensor":
        if not isinstance(value, Tensor):
            raise InputError(f"argument {name}: the graph was captured with a tensor, got {value!r}")
        if expected is not None and value.dim() != expected:
            raise _other_rank(name, expected, value)
    if kind == "=" and (type(value) is not type(expected) or value != expected):
        got = "a tensor" if isinstance(value, Tensor) else repr(value)
        raise InputError(
            f"argument {name}: the graph was captured with {expected!r}, got {got}; capture again with an example "
            "that has it"
        )
    if kind == "dict":
        if not isinstance(value, dict) or {str(key) for key in value} != set(expected):
            raise InputError(f"argument {name}: the graph was captured with a dict of {sorted(expected)}")
        for key, item in value.items():
            check_argument(item, expected[str(key)], f"{name}[{key!r}]")
    if kind == "sequence":
        if not isinstance(value, (tuple, list)) or len(value) != len(expected):
            raise InputError(f"argument {name}: the graph was captured with a sequence of {len(expected)}")
        for index, (item, part) in enumerate(zip(value, expected, strict=True)):
            check_argument(item, part, f"{name}[{index}]")
    if kind == "object":
        expected, ranks = expected
        for attribute, rank in ranks.items():
            item = getattr(value, attribute, None)
            if isinstance(item, Tensor) and item.dim() != rank:
                raise _other_rank(f"{name}.{attribute}", rank, item)
    if kind in ("type", "object") and type(value).__name__ != expected:
        raise InputError(f"argument {name}: the graph was captured with a {expected}, got {type(value).__name__}")


def _other_rank(name: str, rank: int, value: Tensor) -> InputError:
    return InputError(
        f"argument {name}: the graph was captured with a tensor of {rank} dimensions, got one of {value.dim()}; "
        "capture again with an example that has as many"
    )


def check_decision(value: Any, expected: Any, place: str) -> None:
    """A node where forward took a plain value of the input: a number of rounds, the outcome of a comparison.

    Raises:
        InputError: with the line of the user's code, the value for the example and the value now.
    """
    if isinstance(value, Tensor) or value != expected:
        got = "a tensor" if isinstance(value, Tensor) else repr(value)
        raise InputError(
            f"{place} meets {got} where the example gave {expected!r}, which decides what is in the graph; capture "
            "again with an example that has it"
        )
