"""Gives every chosen site its sparsity, through the same `allocate` that works on bare shapes."""

from collections.abc import Collection, Mapping, Sequence

from fxsparse.core.allocation import allocate
from fxsparse.core.records import WeightSite


def allocate_sparsity(
    sites: Sequence[WeightSite],
    sparsity: float,
    distribution: str | Mapping[str, float] = "erk",
    *,
    dense: Collection[str] = (),
    explicit: Mapping[str, float] | None = None,
    power: float = 1.0,
    dense_inside: bool = True,
) -> dict[str, float]:
    """Sparsity of every site by name; arguments and errors as for `fxsparse.allocate`."""
    return allocate(
        {site.name: site.matrix or site.shape for site in sites},
        sparsity,
        distribution,
        dense=dense,
        explicit=explicit,
        power=power,
        dense_inside=dense_inside,
        matrices={site.name: site.matrices for site in sites},
    )
