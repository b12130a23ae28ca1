"""Functions of `torch` whose products disappear among elementwise ATen operations: a row a function.

`torch.outer` becomes a broadcast `mul`, and so do parts of an `einsum`; ATen alone would call that
elementwise work. These rules see the call as the user wrote it.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

FunctionRule = Callable[[tuple, dict[str, Any], Any], int]
"""`(args, kwargs, result) -> MACs`."""


def _every_product(args: tuple, kwargs: dict[str, Any], result: Tensor) -> int:
    """Every element of the result is one product."""
    return result.numel()


def _einsum(args: tuple, kwargs: dict[str, Any], result: Tensor) -> int:
    labels, output, operands = parse_einsum(args)
    return einsum_macs(labels, output, [tuple(operand.shape) for operand in operands])


def _vector_dot(args: tuple, kwargs: dict[str, Any], result: Tensor) -> int:
    """One product for every element of the (broadcast) operands."""
    return torch.broadcast_shapes(args[0].shape, args[1].shape).numel()


def _grouped_product(args: tuple, kwargs: dict[str, Any], result: Tensor) -> int:
    """Rows, columns or inner dimensions of one factor go by groups to the matrices of the other: each is used once."""
    left, right = (*args, *kwargs.values())[:2]
    shared = left.shape[0] if left.ndim > right.ndim else 1  # columns of the right one are spread over the left ones
    return left.numel() * right.shape[-1] // shared


FUNCTIONS: dict[Callable, FunctionRule] = {
    **{
        getattr(place, name): _grouped_product
        for place, name in ((torch, "_grouped_mm"), (torch.nn.functional, "grouped_mm"))
        if hasattr(place, name)
    },
    torch.linalg.vecdot: _vector_dot,
    torch.outer: _every_product,
    torch.ger: _every_product,
    torch.kron: _every_product,
    Tensor.outer: _every_product,
    Tensor.ger: _every_product,
    Tensor.kron: _every_product,
    torch.einsum: _einsum,
}


def einsum_order(count: int) -> str:
    """In which order torch contracts this many operands; for reports."""
    if count > 2 and torch.backends.opt_einsum.is_available() and torch.backends.opt_einsum.enabled:
        return "in the order that opt_einsum gives"
    return "left to right"


def einsum_macs(labels: Sequence[Sequence[Any]], output: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> int:
    """MACs of an einsum, contracted pair by pair in the order that torch takes.

    That is from left to right, or with three or more operands what `opt_einsum` gives where it is installed.
    A pair costs one product for every combination of its indices; an index that is summed away and that only
    one of the two has is summed before, as torch does. One operand alone has no product.

    Args:
        labels: the index labels of each operand, one a dimension.
        output: the labels that stay.
        shapes: the operands' shapes; a dimension of 1 broadcasts.
    """
    return sum(macs for macs, _ in einsum_steps(labels, output, shapes))


def einsum_steps(
    labels: Sequence[Sequence[Any]], output: Sequence[Any], shapes: Sequence[tuple[int, ...]]
) -> list[tuple[int, tuple[int, ...]]]:
    """The steps of `einsum_macs`: MACs, and which of the operands a step takes as they are (by position)."""
    terms = [_extents(own, shape) for own, shape in zip(labels, shapes, strict=True)]
    given: list[int | None] = list(range(len(terms)))
    steps = []
    for left, right in _pairs(labels, output, shapes):
        a, b = terms[left], terms[right]
        taken = tuple(index for index in (given[left], given[right]) if index is not None)
        given = [*(index for place, index in enumerate(given) if place not in (left, right)), None]
        rest = [term for index, term in enumerate(terms) if index not in (left, right)]
        kept = set(output).union(*rest) if rest else set(output)
        a = {key: size for key, size in a.items() if key in kept or key in b}
        b = {key: size for key, size in b.items() if key in kept or key in a}
        joined = {key: max(a.get(key, 1), b.get(key, 1)) for key in {**a, **b}}
        steps.append((prod(joined.values()), taken))
        terms = [*rest, {key: size for key, size in joined.items() if key in kept}]
    return steps


def _extents(labels: Sequence[Any], shape: tuple[int, ...]) -> dict[Any, int]:
    found: dict[Any, int] = {}
    for label, size in zip(labels, shape, strict=True):
        found[label] = max(found.get(label, 1), size)
    return found


def _pairs(labels: Sequence[Sequence[Any]], output: Sequence[Any], shapes: Sequence[tuple]) -> list[tuple[int, int]]:
    """Positions of the two terms that each step contracts; the result goes to the end of the list."""
    count = len(labels)
    if einsum_order(count) == "left to right":
        # Afterwards the result so far is the last of the list, and the next operand the first.
        return [(0, 1), *[(count - step, 0) for step in range(2, count)]] if count > 1 else []
    import opt_einsum

    letters: dict[Any, str] = {}
    for label in [label for own in (*labels, output) for label in own]:
        letters.setdefault(label, opt_einsum.get_symbol(len(letters)))
    terms = ",".join("".join(letters[label] for label in own) for own in labels)
    equation = f"{terms}->{''.join(letters[label] for label in output)}"
    strategy = torch.backends.opt_einsum.strategy or "auto"
    path = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=strategy)[0]
    return [tuple(sorted(step)) for step in path if len(step) == 2]


def parse_einsum(args: tuple) -> tuple[list[list[Any]], list[Any], list[Tensor]]:
    """Labels of each operand, of the output, and the operands, from any form that `torch.einsum` takes."""
    if isinstance(args[0], str):
        operands = list(args[1]) if len(args) == 2 and isinstance(args[1], tuple | list) else list(args[1:])
        left, arrow, right = args[0].replace(" ", "").partition("->")
        inputs: list[list[Any]] = [_labels(term) for term in left.split(",")]
        given: list[Any] | None = _labels(right) if arrow else None
    else:  # operand, labels, operand, labels, ..., [output labels]
        operands = list(args[0::2]) if len(args) % 2 == 0 else list(args[:-1:2])
        inputs = [list(own) for own in args[1::2]]
        given = list(args[-1]) if len(args) % 2 else None
    inputs = [_without_ellipsis(own, operand.ndim) for own, operand in zip(inputs, operands, strict=True)]
    widest = max((sum(1 for label in own if isinstance(label, _Broadcast)) for own in inputs), default=0)
    if given is not None:
        output = _without_ellipsis(given, len(given) - given.count(Ellipsis) + widest)
    else:
        every = [label for own in inputs for label in own]
        once = sorted((x for x in set(every) if every.count(x) == 1 and not isinstance(x, _Broadcast)), key=str)
        output = [*[_Broadcast(index) for index in range(widest)], *once]
    return inputs, output, operands


class _Broadcast(int):
    """An unnamed dimension of an ellipsis, numbered from the right."""

    def __hash__(self) -> int:
        return hash(("...", int(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Broadcast) and int(self) == int(other)


def _labels(term: str) -> list[Any]:
    found: list[Any] = []
    before, dots, after = term.partition("...")
    found.extend(before)
    if dots:
        found.append(Ellipsis)
    found.extend(after)
    return found


def _without_ellipsis(labels: Sequence[Any], ndim: int) -> list[Any]:
    if Ellipsis not in labels:
        return list(labels)
    at = list(labels).index(Ellipsis)
    missing = ndim - (len(labels) - 1)
    return [*labels[:at], *(_Broadcast(index) for index in reversed(range(missing))), *labels[at + 1 :]]
