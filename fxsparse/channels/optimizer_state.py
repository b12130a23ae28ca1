"""Moves an optimizer from the parameters of a model over to those of the smaller one, with its state cut alike."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import RuntimeStateError
from ..passes.rewrite_channels import Box, cut


def check_holds(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """`RuntimeStateError` unless `optimizer` steps on parameters of `model`, and nothing else does."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise RuntimeStateError(f"optimizer is a {type(optimizer).__name__}; give a torch.optim.Optimizer")
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise RuntimeStateError(
            "the optimizer holds no parameter of this module: build it from the parameters of what is compacted"
        )
    if getattr(model, "_rewirer", None) is not None:
        raise RuntimeStateError(
            "a rewirer is attached to this module and would rewire what the optimizer holds no more; call "
            "rewirer.detach() first"
        )


@torch.no_grad()
def move_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, small: nn.Module, kept: Mapping[str, Box]
) -> None:
    """Changes an optimizer in place, so that schedulers and scalers go on with it.

    State of a parameter's own shape (momentum, moments) is cut as the parameter was, scalars (step counts) stay.
    Groups and their options stay; parameters of other modules too. A step not taken yet is lost with its gradients.

    Args:
        optimizer: holds parameters of `model`, which has no use for it afterwards.
        small: with the same names.
        kept: name of what was cut -> per dimension the indices that are left.

    Raises:
        RuntimeStateError: state of a cut parameter in a shape of which nothing is known; nothing has changed then.
    """
    names = {id(parameter): name for name, parameter in reversed([*model.named_parameters(remove_duplicate=False)])}
    moved: dict[Tensor, tuple[nn.Parameter, Any]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is not None:
                state = optimizer.state.get(parameter)
                if state is not None and name in kept:
                    state = {
                        key: _cut(value, parameter, kept[name], f"{key} of {name}") for key, value in state.items()
                    }
                moved[parameter] = small.get_parameter(name), state
    for group in optimizer.param_groups:
        group["params"] = [moved[one][0] if one in moved else one for one in group["params"]]
    for parameter, (own, state) in moved.items():
        optimizer.state.pop(parameter, None)
        if state is not None:
            optimizer.state[own] = state


def _cut(value: Any, parameter: Tensor, box: Box, what: str) -> Any:
    if isinstance(value, Tensor) and value.shape == parameter.shape:
        return cut(value, box).clone(memory_format=torch.preserve_format)
    if value is None or isinstance(value, (int, float, str)) or (isinstance(value, Tensor) and value.numel() == 1):
        return value
    described = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise RuntimeStateError(
        f"optimizer state {what} is {described}, not one number an element ({tuple(parameter.shape)}), so it cannot be "
        "cut; compact without the optimizer and start a new one"
    )
