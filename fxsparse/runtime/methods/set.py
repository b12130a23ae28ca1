"""Sparse Evolutionary Training (Mocanu et al. 2018, "Scalable training of artificial neural networks ...").

Drops the smallest weights, grows at random. FLOP ledger of a training step: `3 f_s`.
"""

from torch import Tensor

from ..masked_site import MaskedSite
from ..update_rules import set_update
from .base import Method, Moment, Quota


class SET(Method):
    """Drop by magnitude, grow at random; seeded, so the same on every rank."""

    name = "set"
    summary = "drops the smallest weights, grows at random"
    rewires = True

    def rewire(self, site: MaskedSite, gradient: Tensor | None, quota: Quota, moment: Moment) -> Tensor:
        return set_update(site.weight, site.mask, quota.drop, moment.generator(site))
