"""What the zoo says of each of its networks, and how to call one."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class ZooCase:
    """One small network that is hard to capture as a graph.

    `make` builds it from PyTorch's global random state. `example` gives the same input at every call: a
    tensor, a tuple of positional arguments, or a dict of keyword arguments. `dropout` says that it draws
    random numbers in train mode. `refused` is the reason for which capture should refuse it, None where it
    should be captured. `sites` counts the parameters of two or more dimensions that reach a convolution, a linear or
    recurrent layer or a matrix product as its weight, each tied one once; not those shared with an embedding. None
    where capture should refuse.
    """

    make: Callable[[], nn.Module]
    example: Callable[[], Any]
    dropout: bool = False
    refused: str | None = None
    sites: int | None = None


def call(model: nn.Module, example: Any) -> Any:
    """The model's output for an example: a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(example, tuple):
        return model(*example)
    if isinstance(example, dict):
        return model(**example)
    return model(example)


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor inside nested dicts, lists, (named) tuples and dataclass instances, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))


def normal(*shape: int, seed: int = 0) -> Callable[[], Tensor]:
    """An example: a function that gives the same normal tensor of this shape at every call."""
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(high: int, *shape: int, seed: int = 0) -> Callable[[], Tensor]:
    """An example: a function that gives the same int64 tensor in [0, high) at every call."""
    return lambda: torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))
