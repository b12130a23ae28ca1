"""What is refused, and what is compared, when a module is lowered."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..core.errors import RuntimeStateError, VerificationError
from ..core.records import TensorSpec
from ..runtime.methods import Method, Need
from ..runtime.semantics import Semantics

_NOT_ELEMENTWISE = ("Adafactor", "LBFGS", "Muon", "SparseAdam")
_WAY_OUT = "train masked, without lower(train=True)"


def check_trains_lowered(method: Method, semantics: Semantics, channels: Any) -> None:
    """Refuses what needs weights, gradients or an optimizer's state at inactive positions.

    Args:
        channels: the channel plan, or None.

    Raises:
        RuntimeStateError: what it is, and the way out.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        raise RuntimeStateError(f"training on active weights alone is for one process; {_WAY_OUT}")
    if channels is not None:
        raise RuntimeStateError(f"channels are cut out, not lowered: attach(compact=True); or {_WAY_OUT}")
    if method.dense_gradient is Need.ALWAYS or method.feeds_optimizer:
        raise RuntimeStateError(f"method {method.name} reads the dense gradient at every step; {_WAY_OUT}")
    if type(method).after_step is not Method.after_step:
        raise RuntimeStateError(f"method {method.name} rewires after every step; {_WAY_OUT}")
    if semantics.optimizer_state != "masked":
        raise RuntimeStateError(
            f"semantics: optimizer_state {semantics.optimizer_state!r} keeps state at inactive positions; {_WAY_OUT}"
        )
    if method.redistribution is not None:
        raise RuntimeStateError(f"redistribution looks at all sites at once; leave it out, or {_WAY_OUT}")


def check_follows(optimizer: torch.optim.Optimizer, method: Method, has_rewired: bool = False) -> None:
    """Refuses an optimizer, or a moment, at which lowered weights cannot be trained.

    Args:
        has_rewired: whether the run has changed its masks already.

    Raises:
        RuntimeStateError: an optimizer that looks at more than one number of a weight at a time, or a method that
            still has to choose its masks from the gradients of all weights.
    """
    name = type(optimizer).__name__
    if name in _NOT_ELEMENTWISE:
        raise RuntimeStateError(f"{name} does not work number by number, so lowered weights cannot use it; {_WAY_OUT}")
    if method.one_shot and not has_rewired:
        raise RuntimeStateError(
            f"method {method.name} has not chosen its masks yet; attach the masked module, and lower it after that"
        )


def check_lowered(
    name: str,
    masked: nn.Module,
    lowered: nn.Module,
    example: tuple[tuple, dict[str, Any]],
    tolerance: float = 1e-3,
) -> None:
    """Compares both on random inputs like the example's, where the masked module's outputs are finite.

    Raises:
        VerificationError: outputs that differ by more than `tolerance` of their largest.
    """
    generator = torch.Generator().manual_seed(0)
    args, kwargs = pytree.tree_map(
        lambda leaf: _random(leaf, generator), example, is_leaf=lambda leaf: isinstance(leaf, TensorSpec)
    )
    modes = {module: module.training for module in masked.modules()}
    try:
        masked.eval()
        with torch.no_grad():
            expected, found = masked(*args, **kwargs), lowered(*args, **kwargs)
    finally:
        for module, training in modes.items():
            module.training = training
    for one, other in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True):
        if isinstance(one, Tensor) and one.is_floating_point() and one.numel():
            finite = one.isfinite()  # infinity times a masked weight is NaN in the masked module alone
            if not finite.any():
                continue
            scale = one[finite].abs().max().clamp(min=1e-12)
            worst = float((one - other)[finite].abs().max() / scale)
            if not worst <= tolerance:
                raise VerificationError(
                    f"{name}, lowered, differs from the masked module by {worst:.1e} of its largest output; "
                    "lower it with layers= naming fewer weights"
                )


def _random(leaf: Any, generator: torch.Generator) -> Any:
    if not isinstance(leaf, TensorSpec):
        return leaf
    if leaf.dtype.is_floating_point:
        return torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype).to(leaf.device)
    if leaf.dtype == torch.bool:
        return torch.ones(leaf.shape, dtype=torch.bool, device=leaf.device)
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
