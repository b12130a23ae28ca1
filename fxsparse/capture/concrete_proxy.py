"""A proxy that knows the value its node has for the example.

Python that asks for a plain number, a length or a truth value gets the example's, and the graph a node that
refuses calls for which it would be another; everything else is recorded. A tensor's *contents* are never
known: asking for them is data-dependent control flow and is refused with the line that asked.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..core.graphs import IN_PLACE_OPERATORS, operation_name
from .certain import certain_truth
from .size_text import text_decides


class SizeTuple(tuple):
    """What `x.shape` is while tracing: one proxy a dimension, each knowing its number."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return SizeTuple(found) if isinstance(index, slice) else found

    def __add__(self, other: Any) -> "SizeTuple":
        return SizeTuple((*self, *other))

    def numel(self) -> Any:
        return math.prod(self)

    def __repr__(self) -> str:
        return f"torch.Size({list(self)})"


_RANK = ("ndim", "ndimension", "dim")
_SIZE = ("shape", "size")
_PIECES = ("unbind", "split", "chunk", "tensor_split", "hsplit", "vsplit", "dsplit")
"""Operations that give as many tensors as the sizes say."""
_LIST_OPERATORS = ("mul", "add", "imul", "iadd")
"""Operators after which a list of tensors (`[t] * x.shape[0]`) has as many entries as the sizes say."""


class ConcreteProxy(fx.Proxy):
    """An `fx.Proxy` with the `value` (a fake tensor, a number, a container) of its node for the example."""

    value: Any
    tracer: Any

    def __init__(self, node: fx.Node, tracer: Any, value: Any) -> None:
        super().__init__(node, tracer)
        self.value = value

    def __repr__(self) -> str:
        if isinstance(self.value, Tensor):
            return f"ConcreteProxy({self.node.name})"
        self._written_out()
        return repr(self.value)

    def _written_out(self) -> None:
        """A number becomes part of a text: where the text decides, the graph holds for this number only."""
        if is_number(self.value) and text_decides():
            self.tracer.decided(operator.pos, self)

    # -- attributes and methods ---------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name in ("value", "node", "tracer"):  # not yet set: an unpickled or half-built proxy
            raise AttributeError(name)
        if isinstance(self.value, Tensor):
            if name == "shape":
                return self._sizes()
            if name == "ndim":
                return self._rank()
        attribute = getattr(self.value, name)
        if callable(attribute) and not isinstance(attribute, Tensor):
            return _Method(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def _sizes(self) -> SizeTuple:
        return SizeTuple(self._size(dim) for dim in range(self._rank()))

    def _rank(self) -> int:
        self.tracer.ranks_read = True
        return self.value.ndim

    def _size(self, dim: int) -> Any:
        return self.tracer.create_proxy("call_method", "size", (self, dim), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("value", "node", "tracer"):
            object.__setattr__(self, name, value)
        else:
            self.tracer.create_proxy("call_function", setattr, (self, name, value), {})

    # -- plain values -------------------------------------------------------------------------------------

    def _plain(self, function: Callable, wanted: str) -> Any:
        """`function` of the value, unless it is a tensor, whose contents tracing does not know."""
        if isinstance(self.value, Tensor):
            raise self.tracer.data_dependent(f"{wanted} of a tensor depends on its data")
        return self.tracer.decided(function, self) if is_number(self.value) else function(self.value)

    def __bool__(self) -> bool:
        certain = certain_truth(self.node) if isinstance(self.value, Tensor) else None
        if certain is not None:
            return certain
        return self._plain(operator.truth, "the truth value")

    def __int__(self) -> int:
        return self._plain(int, "the integer value")

    def __index__(self) -> int:
        return self._plain(operator.index, "the integer value")

    def __float__(self) -> float:
        return self._plain(float, "the float value")

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.create_proxy("call_function", round, (self,) if digits is None else (self, digits), {})

    def __ceil__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.ceil, (self,), {})

    def __floor__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.floor, (self,), {})

    def __trunc__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.trunc, (self,), {})

    def __mul__(self, other: Any) -> Any:
        repeated = self._repetition(other)
        return super().__mul__(other) if repeated is None else repeated  # type: ignore[misc]

    def __rmul__(self, other: Any) -> Any:
        repeated = self._repetition(other)
        return super().__rmul__(other) if repeated is None else repeated  # type: ignore[misc]

    def _repetition(self, other: Any) -> Any:
        """`other * self` for a list without tensors, which Python may read: the graph holds for this number only."""
        if not isinstance(other, (list, tuple)) or isinstance(other, ConcreteProxy) or not is_number(self.value):
            return None
        if any(isinstance(item, ConcreteProxy) and isinstance(item.value, Tensor) for item in other):
            return None  # goes on to `cat` or `stack` as a node, and follows the size
        return other * self.tracer.decided(int, self)

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __format__(self, spec: str) -> str:
        self._written_out()
        return repr(self) if isinstance(self.value, Tensor) else format(self.value, spec)

    def __str__(self) -> str:
        self._written_out()
        return repr(self) if isinstance(self.value, Tensor) else str(self.value)

    def __hash__(self) -> int:
        if is_number(self.value):  # the key of a dict or cache: what is found there is right for this number
            return hash(self.tracer.decided(operator.pos, self))
        return id(self) if isinstance(self.value, (Tensor, list, dict, set)) else hash(self.value)

    # -- containers ---------------------------------------------------------------------------------------

    def __len__(self) -> int:
        if isinstance(self.value, Tensor) and self.value.ndim:
            return self.tracer.decided(operator.pos, self._size(0))
        is_part = self.node.target is operator.getitem and isinstance(self.node.args[1], slice)
        is_open = is_part or operation_name(self.node) in (*_PIECES, *_LIST_OPERATORS)
        return self.tracer.decided(len, self) if is_open else len(self.value)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, Mapping):
            return iter(self.keys())
        return iter([operator.getitem(self, index) for index in range(len(self))])

    def __contains__(self, item: Any) -> bool:
        if isinstance(self.value, Mapping):
            return item in self.value
        if isinstance(self.value, Tensor):
            raise self.tracer.data_dependent("membership in a tensor depends on its data")
        return any(item is element or item == element for element in self)

    def keys(self) -> Any:  # fx.Proxy has a method of this name, for `**proxy`
        return list(self.tracer.decided(list, self) if len(self.value) > 1 else self.value)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _mapping_get(mapping: Any, key: Any, default: Any = None) -> Any:
    return mapping[key] if key in mapping.value else default


_MAPPING: dict[str, Callable] = {
    "get": _mapping_get,
    "keys": lambda mapping: mapping.keys(),
    "values": lambda mapping: [mapping[key] for key in mapping.keys()],  # noqa: SIM118 - proxy, not dict
    "items": lambda mapping: [(key, mapping[key]) for key in mapping.keys()],  # noqa: SIM118
}


class _Method:
    """A bound method of a proxy, recorded when it is called."""

    def __init__(self, owner: ConcreteProxy, name: str) -> None:
        self.owner = owner
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner, name = self.owner, self.name
        if isinstance(owner.value, Tensor):
            if name in _RANK:
                return owner._rank()
            if name in _SIZE and not args and not kwargs:
                return owner._sizes()
        if isinstance(owner.value, Mapping) and name in _MAPPING:
            return _MAPPING[name](owner, *args)
        return owner.tracer.create_proxy("call_method", name, (owner, *args), kwargs)


def _define_in_place(name: str) -> None:
    """`x += y` changes a tensor in place for everyone who holds it; fx alone would record `x = x + y`."""
    target: Callable = getattr(operator, name)

    def method(self: ConcreteProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    setattr(ConcreteProxy, f"__{name}__", method)


for _name in IN_PLACE_OPERATORS:
    _define_in_place(_name)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_plain(value: Any) -> bool:
    """Whether a node's value is handed to Python as it is: flags, names and kinds, never sizes."""
    return value is None or isinstance(
        value, (bool, str, torch.dtype, torch.layout, torch.memory_format, type, type(NotImplemented), slice)
    )
