"""The older `torch.nn.utils.weight_norm` and `spectral_norm`: hooks that set a module's weight before every forward.

They keep what they computed last as a plain attribute, with its history, which a copy of the module cannot have; and
the power iteration of the spectral norm changes buffers without a gradient, which a graph holds as one call.
"""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def computed_by_hooks(module: nn.Module) -> dict[str, Tensor]:
    """Attribute name -> the tensor that such a hook has left there, and will replace at the next call."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, (WeightNorm, SpectralNorm))]
    found = {hook.name: module.__dict__.get(hook.name) for hook in hooks}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def has_other_hooks(module: nn.Module) -> bool:
    """Whether a module has other hooks before its forward than these."""
    return not all(isinstance(hook, (WeightNorm, SpectralNorm)) for hook in module._forward_pre_hooks.values())


def spectral_weight(
    weight: Tensor, u: Tensor, v: Tensor, dim: int, iterations: int, eps: float, do_power_iteration: bool
) -> Tensor:
    """The weight over its largest singular value; with `do_power_iteration`, `u` and `v` are changed in place."""
    norm = SpectralNorm("weight", iterations, dim, eps)
    return norm.compute_weight(SimpleNamespace(weight_orig=weight, weight_u=u, weight_v=v), do_power_iteration)  # type: ignore[arg-type]


_plain_compute = SpectralNorm.compute_weight


def recorded_compute_weight(norm: SpectralNorm, module: Any, do_power_iteration: bool) -> Any:
    """Stands for `SpectralNorm.compute_weight` while tracing: records one call."""
    weight, u, v = (getattr(module, f"{norm.name}_{part}") for part in ("orig", "u", "v"))
    if not isinstance(weight, fx.Proxy):
        return _plain_compute(norm, module, do_power_iteration)
    args = (weight, u, v, norm.dim, norm.n_power_iterations, norm.eps, do_power_iteration)
    return weight.tracer.create_proxy("call_function", spectral_weight, args, {})
