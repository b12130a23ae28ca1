"""The sparsity at which a distribution costs a given fraction of the dense FLOPs."""

import math
from collections.abc import Callable, Mapping

from .errors import AllocationError
from .masking import floor_count

TOLERANCE = 1e-3
"""How far the solution may be from the budget, relative to it."""


def solve_flop_budget(
    sizes: Mapping[str, int],
    flops: float,
    allocated: Callable[[float], Mapping[str, float]],
    macs: Mapping[str, int],
    other_macs: int = 0,
) -> float:
    """The overall sparsity whose allocation costs `flops` times the dense model, to one part in a thousand.

    The cost falls as the sparsity grows, so bisection finds it; costs are those of whole weights.

    Args:
        sizes: name -> number of weights, or of the units of them that are kept or removed as one.
        flops: wanted cost over the dense cost, in (0, 1].
        allocated: from an overall sparsity to the sparsity of every site; raises `AllocationError` where
            there is no solution.
        macs: name -> MACs of all calls that use the weight, dense; a site without an entry costs nothing.
        other_macs: MACs of everything that has no site and stays as it is.

    Raises:
        AllocationError: a budget outside (0, 1], or out of this distribution's reach: with what it reaches.
    """
    if not 0.0 < flops <= 1.0:
        raise AllocationError(f"flops: {flops} is outside (0, 1]; 0.2 asks for a fifth of the dense FLOPs")
    dense = sum(macs.get(name, 0) for name in sizes) + other_macs
    if not dense:
        raise AllocationError("flops: no weight site costs anything, so there is no budget to meet")

    def ratio(sparsity: float) -> float | None:
        try:
            sparsities = allocated(sparsity)
        except AllocationError:
            return None
        total = other_macs
        for name, size in sizes.items():
            total += macs.get(name, 0) * (size - floor_count(sparsities[name], size)) // size
        return total / dense

    feasible = [step / 256 for step in range(256) if ratio(step / 256) is not None]
    if not feasible:
        allocated(0.5)  # raises what is wrong
        raise AllocationError("flops: the given sites leave no overall sparsity to choose")
    low, high = _edge(feasible[0], -1, ratio), _edge(feasible[-1], 1, ratio)
    most, least = ratio(low), ratio(high)
    assert most is not None and least is not None
    if not least * (1 - TOLERANCE) <= flops <= most * (1 + TOLERANCE):
        stays = f"; {other_macs / dense:.4g} of it has no mask" if other_macs else ""
        raise AllocationError(
            f"flops: {flops} of dense is out of reach; this distribution costs between {least:.4g} and "
            f"{most:.4g}{stays}. Ask for something in between, keep fewer weights dense, or take another distribution"
        )
    for _ in range(60):
        middle = (low + high) / 2
        value = ratio(middle)
        if value is None or value > flops:
            low = middle
        else:
            high = middle
    best = min((low, high), key=lambda s: abs((ratio(s) or math.inf) - flops))
    reached = ratio(best) or math.inf
    if abs(reached - flops) > TOLERANCE * flops:
        raise AllocationError(
            f"flops: the nearest to {flops} of dense that whole weights allow here is {reached:.5f}; ask for that"
        )
    return best


def _edge(inside: float, direction: int, ratio: Callable[[float], float | None]) -> float:
    """The last sparsity with a solution, from one that has some towards one that has none."""
    outside = min(max(inside + direction / 256, 0.0), 1.0 - 2**-40)
    if ratio(outside) is not None:
        return outside
    for _ in range(40):
        middle = (inside + outside) / 2
        if ratio(middle) is None:
            outside = middle
        else:
            inside = middle
    return inside
