"""RigL (Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", Algorithm 1).

Drops the smallest weights, grows where the dense gradient is largest. FLOP ledger of a training step,
averaged over an interval: `(3 delta_t f_s + 2 f_s + f_d) / (delta_t + 1)`.
"""

from torch import Tensor

from ..masked_site import MaskedSite
from ..update_rules import rigl_update
from .base import Method, Moment, Need, Quota


class RigL(Method):
    """Drop by magnitude, grow by the magnitude of the dense gradient."""

    name = "rigl"
    summary = "drops the smallest weights, grows where the gradient is largest"
    dense_gradient = Need.UPDATES
    rewires = True

    def rewire(self, site: MaskedSite, gradient: Tensor | None, quota: Quota, moment: Moment) -> Tensor:
        assert gradient is not None, "the runtime skips sites without a gradient"
        return rigl_update(site.weight, gradient, site.mask, quota.drop)
