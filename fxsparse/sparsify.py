"""`sparsify`: the passes in their order."""

import warnings
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import nn

from .core.errors import AllocationError, ConfigError, FxSparseWarning, InputError, check_number
from .passes.allocate_sparsity import allocate_sparsity
from .passes.annotate_shapes import annotate_shapes
from .passes.count_flops import count_flops
from .passes.find_sites import find_sites
from .passes.select_sites import Selectors, select_sites
from .passes.solve_flop_budget import solve_flop_budget
from .passes.trace import trace
from .passes.verify import verify as verify_outputs
from .runtime.methods import Method, make_method
from .runtime.schedule import UpdateSchedule
from .sparse_module import SparseModule


def sparsify(
    model: nn.Module,
    example_input: Any,
    method: str | Method = "rigl",
    *,
    sparsity: float | None = None,
    flops: float | None = None,
    distribution: str | Mapping[str, float] = "erk",
    drop_fraction: float = 0.3,
    update_interval: int = 100,
    stop_fraction: float = 0.75,
    decay: str = "cosine",
    include: Selectors | None = None,
    exclude: Selectors = (),
    dense: Selectors = (),
    explicit: Mapping[str, float] | None = None,
    power: float = 1.0,
    granularity: str = "weight",
    seed: int = 0,
    verify: bool = True,
) -> SparseModule:
    """Turns a model into a masked `torch.fx` GraphModule that trains sparsely in the user's own loop.

    The model is captured on a copy and never touched. Build the optimizer from the result's parameters:

        sparse = fxsparse.sparsify(model, example_input)
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
        sparse.attach(optimizer, total_steps=97_656)

    Args:
        model: any module; capture tells by name what it cannot take.
        example_input: a tensor, a tuple of positional arguments, or a dict of keyword arguments, on the
            model's device. Its sizes decide control flow on shapes and the FLOP counts.
        method: a name from `fxsparse.methods()`, or a `Method`.
        sparsity: fraction of the site's weights to remove, in [0, 1); 0.9 without a budget in `flops`.
        flops: instead of `sparsity`: forward FLOPs over those of the dense model, in (0, 1]; the sparsity is
            solved for, such that the distribution meets it to one part in a thousand.
        distribution: `"uniform"`, `"er"`, `"erk"`, or a mapping from every weight name to its sparsity.
        drop_fraction: fraction of the active connections rewired at first (the paper's alpha).
        update_interval: optimizer steps between rewirings (delta_t).
        stop_fraction: part of the run after which masks stay (the paper's T_end over the total).
        decay: how the drop fraction falls: `"cosine"`, `"constant"`, `"linear"`.
        include, exclude, dense: globs of weight names, module names, `nn.Module` types, and `"first"`,
            `"last"`, `"depthwise"`. Excluded weights have no mask and are in no budget; dense ones stay at
            density 1 inside the budget.
        explicit: weight name or glob -> sparsity, for sites that are given rather than solved.
        power: exponent on the ER and ERK proportions.
        granularity: what is dropped and grown as one; `"weight"`.
        seed: of the initial masks and of every random choice while rewiring.
        verify: run the example through both models, in eval and train mode, and refuse a difference.

    Raises:
        FxSparseError: what is wrong and what would be accepted; nothing was changed.
    """
    method = make_method(method)
    if granularity != "weight":
        raise ConfigError(f"granularity: {granularity!r} is not one of weight")
    if sparsity is not None and flops is not None:
        raise ConfigError("sparsity and flops: give one of the two, not both")
    if sparsity is None:
        sparsity = 0.9
    check_number("seed", seed, whole=True)
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; give an instance of nn.Module: {model!r}"[:200])
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real) or not 0.0 <= sparsity < 1.0:
        raise AllocationError(f"sparsity: {sparsity!r} is outside [0, 1); 0.9 removes nine weights of ten")
    schedule_options: dict[str, Any] = {
        "drop_fraction": drop_fraction,
        "update_interval": update_interval,
        "stop_fraction": stop_fraction,
        "decay": decay,
    }
    UpdateSchedule.for_run(1, **schedule_options)  # refuses bad options before any work

    captured = trace(model, example_input)
    annotate_shapes(captured)
    sites, uncovered = find_sites(captured)
    sites, stay_dense, uncovered = select_sites(
        captured, sites, uncovered, include=include, exclude=exclude, dense=dense
    )
    if flops is not None and method.initial_sparsity(sparsity):
        costs = count_flops(captured.model, captured.graphs["eval"], {})
        sparsity = solve_flop_budget(
            costs, sites, flops, distribution, dense=stay_dense, explicit=explicit, power=power
        )
    sparsities = allocate_sparsity(
        sites,
        method.initial_sparsity(sparsity),
        distribution if method.initial_sparsity(sparsity) else "uniform",
        dense=stay_dense,
        explicit=explicit if method.initial_sparsity(sparsity) else None,
        power=power,
    )
    eager = captured.model
    sparse = SparseModule(captured, sites, uncovered, sparsities, method, schedule_options, seed)
    if verify and not any(tensor.is_meta for tensor in sparse.parameters()):
        sparse.notes += verify_outputs(captured.name, eager, sparse, example_input)
    for note in sparse.notes:
        warnings.warn(note, FxSparseWarning, stacklevel=2)
    return sparse
