"""The example as arguments of the model's forward."""

import inspect
from typing import Any

from torch import nn

from ..core.errors import CaptureError, InputError


def bound_example(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """The example as arguments of `forward`; `InputError` where they do not fit."""
    try:
        signature = inspect.signature(model.forward)
    except ValueError as error:
        raise CaptureError(f"cannot capture {type(model).__name__}: its forward is not Python code") from error
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"example_input does not fit {type(model).__name__}.forward{signature}: {error}") from error
