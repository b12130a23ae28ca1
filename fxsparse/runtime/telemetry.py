"""What a run has done to each site: density, churn, exploration, dead units. Counted on the device, read when asked."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from .sites import Site, Watched

THIN = 0.1
"""A site with less than this share of the units that the allocation gave it is about to be emptied."""


@dataclass(frozen=True)
class SiteTelemetry:
    """One site at one time.

    Attributes:
        name: of the weight.
        active, size: active weights now, and all.
        explored: share of all positions that were ever active: the in-time over-parameterisation rate (Liu et al.
            2021, "Do we actually need dense over-parameterization?").
        churn: mean share of the active connections that one rewiring replaced.
        dead_outputs, outputs: output units (rows, filters) without an active weight, and all.
        dead_inputs, inputs: input units without an active weight, and all; of a grouped convolution, per group.
        grown_gradient_norm: 2-norm of the dense gradient over the connections that the last rewiring grew; None for a
            method that reads no gradient.
    """

    name: str
    active: int
    size: int
    explored: float
    churn: float
    dead_outputs: int
    outputs: int
    dead_inputs: int
    inputs: int
    grown_gradient_norm: float | None = None

    @property
    def density(self) -> float:
        return self.active / self.size


class _Seen:
    """Positions that were ever active: eight to a byte on the CPU, a bool each elsewhere."""

    def __init__(self, mask: Tensor) -> None:
        self.shape, self.packed = mask.shape, mask.device.type == "cpu"
        self.held = _packed(mask) if self.packed else mask.clone()

    def add(self, mask: Tensor) -> None:
        self.held = self.held | _packed(mask) if self.packed else self.held.to(mask.device) | mask

    def mask(self) -> Tensor:
        """Bool, of the site's shape."""
        if not self.packed:
            return self.held
        bits = np.unpackbits(self.held.numpy(), count=self.shape.numel())
        return torch.from_numpy(bits.view(np.bool_)).view(self.shape)


def _packed(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


class Telemetry:
    """Which positions of each site were ever active. `observe` before the masks change."""

    def __init__(self, sites: Sequence[Watched]) -> None:
        self._sites = sites
        self._ever: dict[str, _Seen] = {}

    @torch.no_grad()
    def observe(self) -> None:
        """Adds the present masks."""
        for site in self._sites:
            if site.name in self._ever:
                self._ever[site.name].add(site.mask)
            else:
                self._ever[site.name] = _Seen(site.mask)

    @torch.no_grad()
    def read(self, records: Iterable[Any]) -> list[SiteTelemetry]:
        """A row a site; `records` are the run's `Rewiring`s. Waits for the device."""
        self.observe()
        rewirings = [record for record in records if not record.skipped]
        return [self._read_site(site, rewirings) for site in self._sites]

    def _read_site(self, site: Watched, rewirings: Sequence[Any]) -> SiteTelemetry:
        dead_outputs, outputs, dead_inputs, inputs = site.dead_units()
        shares = [
            record.changed[site.name] / max(record.active.get(site.name, site.active), 1)
            for record in rewirings
            if site.name in record.changed
        ]
        norms = [r.grown_gradient_norm[site.name] for r in rewirings if site.name in r.grown_gradient_norm]
        return SiteTelemetry(
            name=site.name,
            active=site.active,
            size=site.size,
            explored=int(site.shards.add_up(self._ever[site.name].mask().sum().to(site.mask.device))) / site.size,
            churn=sum(shares) / len(shares) if shares else 0.0,
            dead_outputs=dead_outputs,
            outputs=outputs,
            dead_inputs=dead_inputs,
            inputs=inputs,
            grown_gradient_norm=norms[-1] if norms else None,
        )

    def state_dict(self) -> dict[str, Tensor]:
        self.observe()
        return {site.name: site.shards.whole(self._ever[site.name].mask()) for site in self._sites}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        here = [site for site in self._sites if site.name in state]
        self._ever = {site.name: _Seen(site.shards.part(state[site.name])) for site in here}


def telemetry_table(rows: Sequence[SiteTelemetry]) -> str:
    """The rows for a person to read, and the whole below them."""
    active, size = sum(row.active for row in rows), sum(row.size for row in rows)
    explored = sum(row.explored * row.size for row in rows) / size if size else 0.0
    lines = [
        [
            row.name,
            f"{row.density:.4f}",
            f"{row.explored:.4f}",
            f"{row.churn:.4f}",
            f"{row.dead_outputs}/{row.outputs}",
            f"{row.dead_inputs}/{row.inputs}",
            "-" if row.grown_gradient_norm is None else f"{row.grown_gradient_norm:.3g}",
        ]
        for row in rows
    ]
    lines.append(["all", f"{active / size if size else 0:.4f}", f"{explored:.4f}", "", "", "", ""])
    headers = ["weight", "density", "ever active", "churn", "dead outputs", "dead inputs", "grown |gradient|"]
    return tabulate(lines, headers, tablefmt="simple", disable_numparse=True)


def is_thin(site: Site, active: int) -> bool:
    """Whether a site that is left with so many units has hardly any of those that the allocation gave it."""
    return active < THIN * site.target or (active == 0 and site.target > 0)


def thin_message(site: Site, active: int, step: int) -> str:
    """What to say of a site that `is_thin`."""
    return (
        f"{site.name} is about to be emptied: {active} of the {site.target} {site.units} that its allocation gives "
        f"it are left at step {step}; a higher density, or dense=({site.name!r},), keeps it"
    )
