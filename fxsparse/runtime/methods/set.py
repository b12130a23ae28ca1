"""Sparse Evolutionary Training (Mocanu et al. 2018, "Scalable training of artificial neural networks ...").

Drops the smallest weights, grows at random. FLOP ledger of a training step: `3 f_s`.
"""

from typing import ClassVar

from torch import Tensor

from ..sites import Site
from .base import Method, Moment


class SET(Method):
    """Drop by magnitude, grow at random; seeded, so the same on every rank."""

    name = "set"
    summary = "drops the smallest weights, grows at random"
    rewires = True
    grows = True
    granularities: ClassVar[tuple[str, ...]] = ("weight", "channel", "block", "n:m")
    over_shards: ClassVar[bool] = True

    def grow_score(self, site: Site, gradient: Tensor | None, moment: Moment) -> Tensor:
        return moment.lottery(site)
