"""RigL (Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", Algorithm 1).

Drops the smallest weights, grows where the dense gradient is largest. FLOP ledger of a training step,
averaged over an interval: `(3 delta_t f_s + 2 f_s + f_d) / (delta_t + 1)`; with redistribution, the
expectation of it over the run's densities.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..sites import Site
from .base import Method, Moment, Need


class RigL(Method):
    """Drop by magnitude, grow by the magnitude of the dense gradient."""

    name = "rigl"
    summary = "drops the smallest weights, grows where the gradient is largest"
    dense_gradient = Need.UPDATES
    rewires = True
    grows = True
    granularities: ClassVar[tuple[str, ...]] = ("weight", "channel", "block", "n:m")
    over_shards: ClassVar[bool] = True

    def grow_score(self, site: Site, gradient: Tensor | None, moment: Moment) -> Tensor:
        assert gradient is not None, "the runtime skips sites without a gradient"
        return site.score(gradient)


class RigLStruct(RigL):
    """RigL on whole channels (report, supplement), which can be cut out of the graph: see docs/channels.md."""

    name = "rigl-struct"
    summary = "RigL on channels: drops the smallest, grows those with the largest gradient"
    granularities = ("channel",)


@dataclass(kw_only=True, eq=False)
class RigLSG(RigL):
    """RigL whose layers regrow in proportion to their active weights' mean gradient magnitude (report, Table 5)."""

    name = "rigl-sg"
    summary = "RigL; connections move to the layers with the larger gradients"
    granularities = ("weight", "block")
    redistribution: str | None = "gradient"


@dataclass(kw_only=True, eq=False)
class RigLSM(RigL):
    """RigL whose layers regrow in proportion to their active weights' mean momentum magnitude (report, Table 5)."""

    name = "rigl-sm"
    summary = "RigL; connections move to the layers with the larger momentum"
    granularities = ("weight", "block")
    redistribution: str | None = "momentum"
