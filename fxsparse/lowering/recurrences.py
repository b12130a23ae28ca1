"""Which GRU calls are lowered for inference: what could be, and what is faster so."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from ..core.records import Captured, WeightSite
from ..kernels import SparsePattern, sparse_linear_fused
from ..kernels.recurrent import TiledGRU, lowered_gru
from ..passes.lower_recurrent import SparseRecurrence, find_recurrences
from .cost_model import CostModel, best_seconds, density_step, nearest_density
from .decisions import Decision, wanted_layers


@torch.no_grad()
def decide_recurrences(
    captured: Captured,
    sites: Sequence[WeightSite],
    decisions: Sequence[Decision],
    layers: str | Sequence[str],
    cost_model: CostModel | None = None,
) -> tuple[list[Decision], list[SparseRecurrence]]:
    """The decisions, those on the weights of recurrent calls made for inference; and the calls that are lowered.

    Args:
        captured: masked graphs, annotated with the shapes of the example that counts.
        decisions: on every site; the weights of recurrent calls are dense in them.
        layers: `"auto"`, `"all"`, or globs of weight names; without its state's weight among
            them a call stays dense.
    """
    calls, reasons = find_recurrences(captured, sites)
    wanted = wanted_layers(layers, [site.name for site in sites])
    by_name = {decision.name: decision for decision in decisions}
    for name, reason in reasons.items():
        by_name[name] = replace(by_name[name], lowered=False, reason=reason)
    model = cost_model or CostModel()
    lowered = []
    for call in calls:
        of_input, of_state = (by_name[name] for name in call.weights)
        if wanted is None:
            call, own = _fastest(captured, call, of_input, of_state, model)
        else:
            call, own = _asked(call, of_input, of_state, wanted)
        if own[1].lowered:
            lowered.append(call)
        by_name.update((decision.name, decision) for decision in own if decision.name not in reasons)
    return list(by_name.values()), lowered


_TABLE = "it is multiplied with the embedding beforehand"


def _asked(
    call: SparseRecurrence, of_input: Decision, of_state: Decision, wanted: set[str]
) -> tuple[SparseRecurrence, list[Decision]]:
    """The weights that were asked for; without the state's the call stays as it is."""
    missing = "not among the layers that were asked for"
    if of_state.name not in wanted:
        alone = f"the call stays dense without {of_state.name}" if of_input.name in wanted else missing
        return call, [replace(of_input, reason=alone), replace(of_state, reason=missing)]
    sparse = of_input.name in wanted
    chosen = replace(of_input, lowered=sparse, reason="" if sparse else missing)
    by = "sparse" if sparse else "dense"
    return replace(call, by=by), [chosen, replace(of_state, lowered=True, reason="")]


def _fastest(
    captured: Captured, call: SparseRecurrence, of_input: Decision, of_state: Decision, cost_model: CostModel
) -> tuple[SparseRecurrence, list[Decision]]:
    linear_dense, linear_sparse, state, dense = _estimate(
        captured, call, of_input.density, of_state.density, cost_model
    )
    by = "table" if call.may_look_up else "sparse" if linear_sparse < linear_dense else "dense"
    inputs = {"table": 0.0, "sparse": linear_sparse, "dense": linear_dense}[by]
    faster = inputs + state < dense
    slow, why = "dense is faster", {"table": _TABLE, "sparse": "", "dense": "dense is faster"}
    of_input = replace(
        of_input,
        lowered=faster and by == "sparse",
        reason=why[by] if faster else slow,
        sparse_seconds=linear_sparse,
        dense_seconds=linear_dense,
    )
    of_state = replace(
        of_state,
        lowered=faster,
        reason="" if faster else slow,
        sparse_seconds=state,
        dense_seconds=dense - linear_dense,
    )
    return replace(call, by=by), [of_input, of_state]


def _estimate(
    captured: Captured, call: SparseRecurrence, input_density: float, state_density: float, cost_model: CostModel
) -> list[float]:
    shapes = [tuple(captured.model.get_parameter(name).shape) for name in call.weights]
    dtype = captured.model.get_parameter(call.weights[0]).dtype
    steps = [density_step(input_density), density_step(state_density)]
    kind = {
        "gru": shapes,
        "input": call.input.shape,
        "batch_first": call.batch_first,
        "density": steps,
        "dtype": str(dtype),
    }
    return cost_model.remembered(kind, lambda: _measure(call, shapes, [nearest_density(step) for step in steps], dtype))


def _measure(
    call: SparseRecurrence, shapes: Sequence[tuple[int, ...]], densities: Sequence[float], dtype: torch.dtype
) -> list[float]:
    """Seconds of what the input gives, dense and sparse; of the loop; and of `torch.gru`."""
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(shape, generator=generator) < d for shape, d in zip(shapes, densities, strict=True)]
    limit = shapes[1][1] ** -0.5
    weights = [
        (torch.rand(shape, generator=generator, dtype=dtype) * 2 - 1) * limit * mask
        for shape, mask in zip(shapes, masks, strict=True)
    ]
    biases = [weights[0].new_zeros(shapes[0][0]) for _ in range(2)]
    own = TiledGRU.of(*weights, *masks, *biases)
    pattern = SparsePattern.of(own.input_mask)
    places, values = [pattern.starts, pattern.columns], pattern.gather(own.input_weight)
    x = torch.randn(call.input.shape, generator=generator, dtype=dtype)
    h = torch.zeros(call.state.shape, dtype=dtype)
    from_input = F.linear(x, own.input_weight, own.input_bias)
    settings: tuple[Any, ...] = (True, 1, 0.0, False, False, call.batch_first)
    runs: list[Callable[[], Any]] = [
        lambda: F.linear(x, own.input_weight, own.input_bias),
        lambda: sparse_linear_fused(x, values, places, own.input_bias, len(own.input_weight), 1, None, None),
        lambda: lowered_gru(from_input, h, own.values, own.tiles, own.bias, call.batch_first),
        lambda: torch.gru(x, h, [*weights, *biases], *settings),
    ]
    return best_seconds(runs)
