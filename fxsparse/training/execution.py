"""How a run's network is executed: through torch.compile, in which memory format, with which optimizer kernels.

None of it changes what is trained. A compiled network meets three variants of itself in a run, and no more: the
ordinary step, the step that rewires by dense gradients, and the evaluation. Each is compiled for the sizes of its
first batch; the last batch of an evaluation, where it is smaller, goes through the module as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

COMPILE_MODES = ("none", "default", "reduce-overhead")


def canonical_compile_mode(given: Any) -> Any:
    """A mode by its name; earlier configurations say whether to compile at all."""
    return {True: "default", False: "none"}[given] if isinstance(given, bool) else given


def compile_network(module: nn.Module, mode: str) -> Callable[..., Any]:
    """What is called to run `module`: itself under mode "none", else it compiled, every size a constant.

    Under "reduce-overhead" results lie in the memory of CUDA graphs, which the next call overwrites.
    """
    if mode == "none":
        return module
    compiled = torch.compile(module, mode=mode, dynamic=False)

    def call(*inputs: Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*inputs)

    return call


def by_first_size(compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Calls `compiled` with inputs of the sizes that came first, and `plain` with any other."""
    first: list[torch.Size] = []

    def call(*inputs: Tensor) -> Any:
        sizes = [each.shape for each in inputs]
        if not first:
            first.extend(sizes)
        return (compiled if sizes == first else plain)(*inputs)

    return call


@contextmanager
def gate_closed(module: Any) -> Iterator[None]:
    """`module` as on an ordinary step: an evaluation has no gradient, so the gate is no reason to compile anew.

    Weights that are to be read as they are stored, inactive channels among them, stay so.
    """
    before = getattr(module, "dense_gradient", False)
    if before not in (True, "magnitude"):
        yield
        return
    module.dense_gradient = False
    try:
        yield
    finally:
        module.dense_gradient = before


def make_optimizer(parameters: Any, config: Any, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer over all `parameters`, at the configuration's base learning rate.

    One kernel for all parameters ("fused") where the configuration says so, by default on CUDA devices.
    """
    fused = device.type == "cuda" if config.fused is None else config.fused
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": fused or None}
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    if config.optimizer == "sgd":
        common |= {"momentum": config.momentum, "nesterov": config.nesterov}
    return kinds[config.optimizer](parameters, **common)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a saved state and keep this optimizer's kernels: the run may have been on another device."""
    groups = zip(state["param_groups"], optimizer.param_groups, strict=True)
    own = [{**saved, **{name: mine[name] for name in ("fused", "foreach") if name in mine}} for saved, mine in groups]
    optimizer.load_state_dict({**state, "param_groups": own})
