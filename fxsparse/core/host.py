"""Whether the host can look at a tensor."""

import torch
from torch import Tensor


def on_host(tensor: Tensor) -> bool:
    """Whether the values can be looked at without waiting for a device, and NumPy can work on them."""
    return tensor.device.type == "cpu" and not is_traced(tensor)


def is_traced(tensor: Tensor) -> bool:
    """Whether this stands for values, or for many of them, that are not there: somebody compiles or transforms."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return isinstance(tensor, torch._subclasses.FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
