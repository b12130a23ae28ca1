"""Parameters and masks of which every rank holds a part: DTensors, as `fully_shard` (FSDP2) makes of parameters.

`fully_shard` gathers parameters before the forward pass and nothing else. A sharded mask therefore cannot take part in
it, and need not: what is stored at inactive positions is 0, so the gathered weight is the masked weight. The backward
pass hands on the gradient of every position, and what remains of it is decided after it was averaged and cut into
parts, where each rank has its part of the mask (`runtime/sharded_site.py`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from .errors import RuntimeStateError

MAGNITUDE = ("magnitude", "stored magnitude")
"""Values of the gate under which a weight gets the magnitude of its gradient."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    return type(tensor) is not Tensor and hasattr(tensor, "device_mesh")  # without importing torch.distributed


def is_fully_sharded(module: Any) -> bool:
    """Whether `fully_shard` was called on this module as a whole."""
    return hasattr(module, "reshard") and hasattr(module, "unshard")  # of an FSDPModule


def local_part(tensor: Any) -> Tensor:
    """What this rank holds of a DTensor, to be changed in place too; another tensor as it is."""
    with torch.no_grad():
        return tensor.to_local() if is_sharded(tensor) else tensor


def count_true(mask: Tensor) -> int:
    """Number of True elements. Waits for the device; of a DTensor, every rank has to ask."""
    return int(mask.sum().full_tensor()) if is_sharded(mask) else int(mask.sum())  # type: ignore[attr-defined]


class _Magnitude(torch.autograd.Function):
    """The weight as it is; backward hands on the magnitude of the gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        return torch.ops.aten.alias(weight)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient.abs()


def gathered_weight(weight: Tensor, dense_gradient: bool | str) -> Tensor:
    """What `apply_mask` gives for a gathered weight whose mask is sharded: the weight, in the same memory.

    No copy is made: what autograd keeps for the backward pass can be freed and gathered again.
    """
    return _Magnitude.apply(weight) if dense_gradient in MAGNITUDE else weight


def refuse_sharded(module: nn.Module, what: str) -> None:
    """`RuntimeStateError` for what needs the whole of a module whose parameters are sharded."""
    if is_fully_sharded(module):
        raise RuntimeStateError(
            f"{what}: this module's weights are sharded over ranks; load "
            "get_model_state_dict(sparse, options=StateDictOptions(full_state_dict=True)) into a SparseModule that is "
            "not, and use that one"
        )
