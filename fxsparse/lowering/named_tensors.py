"""A module's tensors by name, as a sparse file has them, on the meta device or off it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..core.errors import CheckpointError
from ..core.records import TensorSpec


def names_of(module: nn.Module) -> dict[str, Tensor]:
    """Everything that `state_dict` has by name, at the size that it is stored in."""
    names: dict[str, Tensor] = {}
    for path, inner in module.named_modules(remove_duplicate=False):
        if type(inner).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(f"{path} has an extra state, which is no tensor; save its state_dict instead")
        held = {**inner._parameters, **inner._buffers}
        for last, tensor in held.items():
            if tensor is not None and last not in inner._non_persistent_buffers_set:
                names[f"{path}.{last}" if path else last] = tensor
    return names


def check_rest_is_there(module: nn.Module) -> None:
    """Of a module on the meta device, what no file has would stay there."""
    for path, inner in module.named_modules():
        for last in inner._non_persistent_buffers_set:
            buffer = inner._buffers.get(last)
            if buffer is not None and buffer.is_meta:
                name = f"{path}.{last}" if path else last
                raise CheckpointError(f"{name} is on the meta device, and in no file, since it is not persistent")


def off_meta(example: Any) -> Any:
    """An example of specs for a module that has memory now."""

    def moved(leaf: Any) -> Any:
        on_meta = isinstance(leaf, TensorSpec) and leaf.device.type == "meta"
        return replace(leaf, device=torch.device("cpu")) if on_meta else leaf

    return pytree.tree_map(moved, example, is_leaf=lambda leaf: isinstance(leaf, TensorSpec))


def assign(module: nn.Module, names: Sequence[str], tensor: Tensor) -> None:
    """Fills a tensor that has several names; one on the meta device is replaced."""
    made: Tensor | None = None
    for name in names:
        owner, _, last = name.rpartition(".")
        holder = module.get_submodule(owner)
        table: Any = holder._parameters if last in holder._parameters else holder._buffers
        own = table[last]
        if not own.is_meta:
            own.copy_(tensor)
            return
        if made is None:
            made = nn.Parameter(tensor, own.requires_grad) if isinstance(own, nn.Parameter) else tensor
        table[last] = made
