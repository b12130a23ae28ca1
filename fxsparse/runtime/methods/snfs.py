"""Sparse momentum, "Sparse networks from scratch" (Dettmers and Zettlemoyer 2019).

Drops the smallest weights, grows where the running mean of the dense gradient is largest, and moves connections
to the layers whose active weights have the larger momentum. FLOP ledger of a training step: `2 E[f_s] + f_d`, since
the gradient of every weight is computed in every step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.errors import ConfigError, check_number
from ..sites import Site
from .base import Method, Moment, Need, check_momentum


@dataclass(kw_only=True, eq=False)
class SNFS(Method):
    """Drop by magnitude, grow by the magnitude of a momentum over dense gradients.

    Attributes:
        momentum: `"average"`, an exponential average of its own, `m = beta m + (1 - beta) g`; or `"optimizer"`, the
            buffers of SGD or Adam, which then see dense gradients in every step (as in the report).
        beta: of the average.
    """

    name = "snfs"
    summary = "drops the smallest weights, grows by momentum, moves connections between layers"
    dense_gradient = Need.ALWAYS
    rewires = True
    grows = True
    granularities: ClassVar[tuple[str, ...]] = ("weight", "block", "n:m")

    redistribution: str | None = "momentum"
    momentum: str = "average"
    beta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta)
        if self.momentum not in ("average", "optimizer"):
            raise ConfigError(f"momentum: {self.momentum!r} is not one of average, optimizer")
        if not 0.0 <= self.beta < 1.0:
            raise ConfigError(f"beta: {self.beta} is outside [0, 1)")
        self._averages: dict[str, Tensor] = {}

    @property
    def feeds_optimizer(self) -> bool:
        return self.momentum == "optimizer"

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        if self.feeds_optimizer:
            check_momentum(optimizer, self.name)

    @torch.no_grad()
    def observe(self, sites: Sequence[Site], gradients: Sequence[Tensor | None], step: int) -> None:
        if self.feeds_optimizer:
            return
        for site, gradient in zip(sites, gradients, strict=True):
            if gradient is None:
                continue
            average = self._averages.get(site.name)
            if average is None:
                average = self._averages[site.name] = torch.zeros_like(gradient)
            average = average.to(gradient.device)
            following = self.beta * average + (1.0 - self.beta) * gradient
            # One batch with an infinite gradient must not spoil the average for good.
            self._averages[site.name] = torch.where(torch.isfinite(gradient).all(), following, average)

    def momentum_of(self, site: Site, moment: Moment) -> Tensor:
        """The momentum at all positions, in the form of the site's gradient."""
        if self.feeds_optimizer:
            return site.momentum(moment.optimizer)
        average = self._averages.get(site.name)
        return site.zero_gradient() if average is None else average

    def grow_score(self, site: Site, gradient: Tensor | None, moment: Moment) -> Tensor:
        return site.score(self.momentum_of(site, moment))

    def state_dict(self) -> dict[str, Any]:
        return {"averages": dict(self._averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._averages = {name: average.clone() for name, average in state["averages"].items()}
