"""Masks that never move: random ones, and none at all.

FLOP ledger of a training step (paper, appendix): `3 f_s` for static, `3 f_d` for dense.
"""

from .base import Method


class Static(Method):
    """Random masks of the given densities, drawn once ("Static" in the paper and the report)."""

    name = "static"
    summary = "random masks, never rewired"


class Dense(Method):
    """Masks of ones: the baseline, through the same graph and runtime."""

    name = "dense"
    summary = "masks of ones; the baseline through the same graph"

    def initial_sparsity(self, sparsity: float) -> float:
        return 0.0
