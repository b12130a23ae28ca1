"""Deep rewiring (Bellec et al. 2018, "Deep rewiring: training very sparse deep networks", Algorithm 1).

Every connection has a sign that it keeps. After each optimizer step an active weight also drifts towards 0 and takes
a random step; one that would change its sign is retired, and for each of them a random inactive connection of the
same layer wakes at 0. FLOP ledger of a training step: `3 f_s`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.errors import ConfigError, check_number
from ...core.masking import seeded_generator
from ..masked_site import MaskedSite
from ..schedule import EveryStep, Schedule, UpdateSchedule
from ..selection import select
from ..sites import Site
from ..update_rules import deepr_walk
from .base import Method, Moment, Pattern


@dataclass(kw_only=True, eq=False)
class DeepR(Method):
    """Fixed signs and a random walk: connections that would change sign give way to random ones.

    Attributes:
        l1: the drift towards 0 in a step over the learning rate (alpha in the paper); the authors' code has 1e-5.
        noise: the standard deviation of the random step over the learning rate; the authors' code has 1e-5. In the
            paper's terms the temperature T is `lr noise^2 / 2`.
    """

    name = "deepr"
    summary = "fixed signs and a noisy step; a connection that would change sign gives way to a random one"
    rewires = True

    l1: float = 1e-5
    noise: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("l1", "noise"):
            value = getattr(self, name)
            check_number(name, value)
            if value < 0:
                raise ConfigError(f"{name}: {value} is below 0")
        if self.redistribution is not None:
            raise ConfigError("redistribution: deepr keeps every layer's number of connections; leave it out")
        self._signs: dict[str, Tensor] = {}

    def schedule(self, common: UpdateSchedule, total_steps: int) -> Schedule:
        return EveryStep(common.interval)

    @torch.no_grad()
    def start_run(self, sites: Sequence[Site], seed: int) -> None:
        for site in _single_weights(sites):
            self._sign(site, seed)

    @torch.no_grad()
    def after_step(self, sites: Sequence[Site], moment: Moment) -> list[Pattern] | None:
        kept = [self._walk(site, moment) for site in _single_weights(sites)]
        left: list[int] = torch.stack([mask.sum() for mask in kept]).tolist()
        patterns = []
        for site, alive, number in zip(sites, kept, left, strict=True):
            woken = select(moment.lottery(site), ~alive, site.active - number, largest=True)
            patterns.append(Pattern(alive | woken, site.active, alive))
        return patterns

    def _walk(self, site: MaskedSite, moment: Moment) -> Tensor:
        """Moves the site's weights; the connections that keep their sign (bool, the weight's shape)."""
        weight = site.weight
        generator = seeded_generator(moment.seed, "deepr", moment.step, site.name)
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        rate = float(site.group(moment.optimizer)["lr"])
        moved = deepr_walk(weight, self._sign(site, moment.seed), noise, drift=rate * self.l1, spread=rate * self.noise)
        weight.copy_(torch.where(site.mask, moved, weight))
        return site.mask & (weight * self._sign(site, moment.seed) >= 0)

    def _sign(self, site: MaskedSite, seed: int) -> Tensor:
        """1 or -1 for every position: of the active weights at first sight their own, else drawn at random."""
        if site.name not in self._signs:
            generator = seeded_generator(seed, "sign", site.name)
            drawn = torch.randint(0, 2, site.weight.shape, generator=generator, dtype=torch.int8).to(site.weight.device)
            own = torch.sign(site.weight).to(torch.int8)
            self._signs[site.name] = torch.where(own == 0, 2 * drawn - 1, own)
        return self._signs[site.name].to(site.weight.device)

    def state_dict(self) -> dict[str, Any]:
        return {"signs": dict(self._signs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._signs = {name: sign.clone() for name, sign in state["signs"].items()}


def _single_weights(sites: Sequence[Site]) -> list[MaskedSite]:
    """The sites as what they are at the only granularity of this method: weights with signs of their own."""
    assert all(isinstance(site, MaskedSite) for site in sites)
    return [site for site in sites if isinstance(site, MaskedSite)]
