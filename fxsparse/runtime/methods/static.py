"""Masks that never move: random ones, and none at all.

FLOP ledger of a training step (paper, appendix): `3 f_s` for static, `3 f_d` for dense.
"""

from dataclasses import dataclass
from typing import ClassVar

from ...core.errors import ConfigError
from .base import Method


@dataclass(kw_only=True, eq=False)
class Static(Method):
    """Random masks of the given densities, drawn once ("Static" in the paper and the report)."""

    name = "static"
    summary = "random masks, never rewired"
    granularities: ClassVar[tuple[str, ...]] = ("weight", "channel", "block", "n:m")
    over_shards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.redistribution is not None:
            raise ConfigError(f"redistribution: {self.name} grows nothing; leave it out")


class Dense(Static):
    """Masks of ones: the baseline, through the same graph and runtime."""

    name = "dense"
    summary = "masks of ones; the baseline through the same graph"
    granularities: ClassVar[tuple[str, ...]] = ("weight", "channel", "block")

    def target_sparsity(self, sparsity: float) -> float:
        return 0.0

    def initial_sparsity(self, sparsity: float) -> float:
        return 0.0


class SmallDense(Dense):
    """A narrower dense model with as many parameters as the sparse one ("Small-Dense" in the paper).

    FLOP ledger of a training step: `3 f_s`, with f_s the forward pass of the narrow model. The networks of `models/`
    are built narrower by the command; of any other model `sparsify` removes channels at random, the same share of
    every group.
    """

    name = "small-dense"
    granularities = ("weight",)
    summary = "a narrower dense network with as many parameters"
    changes_widths = True
