"""What an optimizer must be for a module to be attached to it; refused before anything changes."""

import inspect
from typing import Any

import torch

from ..core.errors import RuntimeStateError
from ..core.sharded_tensors import is_sharded
from .masked_site import MaskedModule


def check_optimizer(module: MaskedModule, optimizer: torch.optim.Optimizer) -> None:
    """`RuntimeStateError` unless `optimizer` steps on the gradients it finds and holds every masked weight."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise RuntimeStateError(
            f"attach needs a torch.optim.Optimizer, whose step hooks it uses; got a {type(optimizer).__name__}"
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise RuntimeStateError(
            f"{type(optimizer).__name__}.step needs a closure, which computes gradients after the rewiring is due; "
            "use an optimizer that steps on the gradients it finds, such as SGD or AdamW"
        )
    if any(module.get_parameter(site.name).is_meta for site in module.sites):
        raise RuntimeStateError(
            "the module is on the meta device; materialise it and load its weights and masks before attach"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [site.name for site in module.sites if id(module.get_parameter(site.name)) not in held]
    if missing and is_sharded(module.get_parameter(missing[0])):
        raise RuntimeStateError(
            f"the optimizer does not hold {missing[0]}: fully_shard replaces the parameters, so call it first, then "
            "build the optimizer from sparse.parameters(), then attach"
        )
    if len(missing) == len(module.sites):
        raise RuntimeStateError(
            "the optimizer holds none of this module's weights: it was built from another model, perhaps from the "
            "one before sparsify, which returns a copy; build it from sparse.parameters()"
        )
    if missing:
        raise RuntimeStateError(
            f"the optimizer lacks {len(missing)} of {len(module.sites)} masked weights ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); give it all of them, or exclude them in sparsify"
        )


def refuse_closure(args: tuple, kwargs: dict[str, Any]) -> None:
    """`RuntimeStateError` for the arguments of a step that computes gradients by itself."""
    if any(callable(argument) for argument in (*args, *kwargs.values())):
        raise RuntimeStateError(
            "optimizer.step(closure) is not supported: the gradients would come after the rewiring; "
            "call loss.backward() and then optimizer.step()"
        )
