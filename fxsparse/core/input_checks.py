"""Nodes at the head of an exported graph: what was decided on the example's sizes must hold at every call.

`torch.export` leaves no trace of a decision in its graph, only conditions on the inputs. They are checked here, so
that another input is refused by name and never computes something else.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import InputError


def check_tensor(value: Any, sizes: Sequence[int | None], dtype: torch.dtype, device_type: str, name: str) -> None:
    """The argument `name` must be a tensor of these sizes (None: any), dtype and kind of device.

    Raises:
        InputError: naming the argument, what it was for the example and what it is now.
    """
    if not isinstance(value, Tensor):
        raise InputError(f"argument {name}: the graph was captured with a tensor, got {value!r}")
    fits = value.dim() == len(sizes) and all(
        size is None or size == given for size, given in zip(sizes, value.shape, strict=True)
    )
    if not fits:
        expected = ", ".join("any" if size is None else str(size) for size in sizes)
        raise InputError(
            f"argument {name}: the graph holds for sizes ({expected}), got {tuple(value.shape)}; what is fixed was "
            "baked in at capture, so capture again with an example of that size"
        )
    if value.dtype != dtype or value.device.type != device_type:
        raise InputError(
            f"argument {name}: the graph was captured with {dtype} on {device_type}, got {value.dtype} on "
            f"{value.device.type}; capture again with such an example"
        )


def check_sizes(holds: bool, condition: str, place: str) -> None:
    """A condition on the input's sizes that forward, or an operation in it, came to for the example.

    Raises:
        InputError: with the condition and the line of the user's code.
    """
    if not holds:
        raise InputError(
            f"{place} decided by {condition}, which held for the example's sizes and does not now; capture again with "
            "an example of the sizes given now"
        )
