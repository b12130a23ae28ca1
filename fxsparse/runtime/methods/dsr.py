"""Dynamic sparse reparameterisation (Mostafa and Wang 2019, Algorithm 1).

One magnitude threshold for all layers is steered so that a set fraction of the weights is dropped; layers regrow at
random, in proportion to what they kept. FLOP ledger of a training step: `3 E[f_s]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.errors import ConfigError, check_number
from ...core.masking import floor_count
from ..redistribution import redistribute
from ..sites import Site
from .base import Method, Moment, Quota


@dataclass(kw_only=True, eq=False)
class DSR(Method):
    """Drop below a global threshold, regrow at random where much was kept.

    Attributes:
        threshold: the magnitude at the first rewiring.
        tolerance: the threshold doubles when fewer than `1 - tolerance` of the number wanted fell under it, and halves
            when more than `1 + tolerance` did.
    """

    name = "dsr"
    summary = "drops below a global threshold, grows at random where layers kept most"
    rewires = True
    grows = True
    granularities: ClassVar[tuple[str, ...]] = ("weight", "block")

    threshold: float = 1e-3
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold)
        check_number("tolerance", self.tolerance)
        if self.redistribution is not None:
            raise ConfigError("redistribution: dsr has its own; leave it out")
        if self.threshold <= 0:
            raise ConfigError(f"threshold: {self.threshold} is not above 0")
        if not 0.0 <= self.tolerance < 1.0:
            raise ConfigError(f"tolerance: {self.tolerance} is outside [0, 1)")
        self._threshold = self.threshold

    @property
    def moves_connections(self) -> bool:
        return True

    @torch.no_grad()
    def quotas(self, sites: Sequence[Site], gradients: Sequence[Tensor | None], moment: Moment) -> list[Quota]:
        below = [(site.mask & (site.magnitude() < self._threshold)).sum() for site in sites]
        # A layer keeps one connection at least, or nothing would tell where to regrow.
        dropped = [min(k, max(site.active - 1, 0)) for site, k in zip(sites, torch.stack(below).tolist(), strict=True)]
        if moment.semantics.regrown == "forbidden":
            dropped = [min(k, site.size - site.active) for site, k in zip(sites, dropped, strict=True)]
        wanted = floor_count(moment.fraction, sum(site.active for site in sites))
        self._steer(sum(dropped), wanted)
        grown = redistribute(
            sum(dropped),
            [float(site.active - k) for site, k in zip(sites, dropped, strict=True)],
            [self._room(site, k, moment) for site, k in zip(sites, dropped, strict=True)],
        )
        return [Quota(*pair) for pair in zip(dropped, grown, strict=True)]

    def _steer(self, dropped: int, wanted: int) -> None:
        if dropped < (1.0 - self.tolerance) * wanted:
            self._threshold *= 2.0
        elif dropped > (1.0 + self.tolerance) * wanted:
            self._threshold /= 2.0

    def grow_score(self, site: Site, gradient: Tensor | None, moment: Moment) -> Tensor:
        return moment.lottery(site)

    def state_dict(self) -> dict[str, Any]:
        return {"threshold": self._threshold}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._threshold = state["threshold"]
