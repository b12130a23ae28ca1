"""A module of two linears whose forward is given: for networks that are one line long."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def net(forward: Callable[..., Any], prepare: Callable[[nn.Module], Any] | None = None, **attributes: Any) -> nn.Module:
    """A module with the layers `fc` (8 to 8) and `head` (8 to 3), from the same random weights at every call.

    Args:
        forward: of the module, `(self, *args, **kwargs)`.
        prepare: called with the new module, to give it more parts.
        attributes: of its class.
    """

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
            if prepare:
                prepare(self)

    for name, value in {"forward": forward, **attributes}.items():
        setattr(Net, name, value)
    torch.manual_seed(0)
    return Net()
