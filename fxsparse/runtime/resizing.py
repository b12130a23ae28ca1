"""Gives a parameter another shape in place: the object stays, and so the user's optimizer, which holds it, goes on."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..core.errors import RuntimeStateError


def resize_parameter(
    parameter: nn.Parameter,
    name: str,
    optimizer: torch.optim.Optimizer | None,
    change: Callable[[Tensor], Tensor],
    advice: str,
) -> None:
    """Replaces a parameter's data by `change(data)`, and every buffer of its shape in the optimizer's state.

    Its gradient is dropped.

    Args:
        name: of the parameter, for errors.
        optimizer: that holds it; None for none.
        advice: what to do about an optimizer that cannot follow.

    Raises:
        RuntimeStateError: the optimizer keeps a state of another shape, so that its numbers do not belong to single
            weights.
    """
    check_resizable(parameter, name, optimizer, advice)
    shape, state = parameter.shape, {} if optimizer is None else optimizer.state.get(parameter, {})
    for key, value in list(state.items()):
        if isinstance(value, Tensor) and value.shape == shape:
            state[key] = change(value)
    data = change(parameter.data)
    parameter.grad = None
    # Autograd remembers the shape of a parameter for as long as a loss of the last step is alive; another dtype
    # makes it forget.
    other = torch.float16 if parameter.dtype != torch.float16 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = data


def check_resizable(parameter: nn.Parameter, name: str, optimizer: torch.optim.Optimizer | None, advice: str) -> None:
    """The `RuntimeStateError` of `resize_parameter`, with nothing changed."""
    shape, state = parameter.shape, {} if optimizer is None else optimizer.state.get(parameter, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.numel() > 1 and value.shape != shape:
            raise RuntimeStateError(
                f"{key} of {name} in {type(optimizer).__name__} has shape {tuple(value.shape)}, not {tuple(shape)}, "
                f"so it cannot be cut; {advice}, or use another optimizer"
            )
