"""How many channels of each group stay, such that the whole meets a budget.

A weight shrinks on both sides: of its `rows x columns x kernel` elements those are left whose row and whose
column are. So a budget in elements, or in MACs, is a sum of products of the groups' keep fractions. They are
`min(1, scale * raw)`, and the scale is solved for. `raw` is 1 under `uniform`; under `er` and `erk` it is the root
of the density that the distribution gives the weights which make the group's channels, since such a density is
the product of two fractions.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .allocation import DISTRIBUTIONS, RAW_DENSITY
from .channel_sites import ON_WEIGHTS, ChannelSite
from .errors import AllocationError, ConfigError, SelectionError, nearest

Kept = Mapping[str, int]
"""Name of a channel site -> number of its atoms that stay."""


@dataclass(frozen=True)
class Extent:
    """How a weight shrinks with the channel sites.

    Attributes:
        cost: of one pair of row and column: elements of the kernel, or MACs.
        sides: for each of the first two dimensions its length, and channel site -> its share of
            the indices.
    """

    cost: float
    sides: tuple[tuple[int, Mapping[str, int]], ...]

    def left(self, fractions: Mapping[str, float]) -> float:
        """The cost that is left when each site keeps its fraction."""
        total = self.cost
        for length, owned in self.sides:
            total *= length - sum(count * (1.0 - fractions[name]) for name, count in owned.items())
        return total


def extents_of(
    sites: Sequence[ChannelSite], shapes: Mapping[str, Sequence[int]], costs: Mapping[str, float] | None = None
) -> dict[str, Extent]:
    """The extent of every weight of `shapes`; `costs` are of whole weights (default: their numbers of elements)."""
    extents = {}
    for name, shape in shapes.items():
        owned: list[dict[str, int]] = [{} for _ in shape]
        for site in sites:
            for item in site.of(*ON_WEIGHTS):
                if item.tensor == name:
                    owned[item.dim][site.name] = owned[item.dim].get(site.name, 0) + len(item.positions)
        whole = math.prod(shape) if costs is None else costs[name]
        sides = tuple((length, own) for length, own in zip(shape, owned, strict=True) if own)
        extents[name] = Extent(whole / math.prod(length for length, _ in sides), sides)
    return extents


def raw_fractions(
    sites: Sequence[ChannelSite],
    shapes: Mapping[str, Sequence[int]],
    distribution: str | Mapping[str, float],
    power: float = 1.0,
) -> dict[str, float]:
    """The keep fraction of every site up to the common factor.

    Raises:
        ConfigError: an unknown distribution.
    """
    if distribution == "uniform" or not isinstance(distribution, str):
        return {site.name: 1.0 for site in sites}
    if distribution not in RAW_DENSITY:
        raise ConfigError(
            f"distribution: {distribution!r} is not one of {', '.join(DISTRIBUTIONS)}"
            + nearest(distribution, DISTRIBUTIONS)
        )
    raw = {}
    for site in sites:
        sizes = [math.prod(shapes[name]) for name in site.producers]
        densities = [RAW_DENSITY[distribution](shapes[name]) ** power for name in site.producers]
        mean = sum(size * density for size, density in zip(sizes, densities, strict=True)) / sum(sizes)
        raw[site.name] = math.sqrt(mean)
    return raw


def allocate_channels(
    sites: Sequence[ChannelSite],
    extents: Mapping[str, Extent],
    raw: Mapping[str, float],
    density: float,
    *,
    given: Mapping[str, float] | None = None,
    other: float = 0.0,
) -> dict[str, int]:
    """How many atoms each site keeps, so that at most `density` of the whole cost is left.

    The fractions that meet the budget are rounded down, at least one atom a site; what that leaves of the budget goes
    to the sites whose fractions lost most, an atom each, as far as it reaches.

    Args:
        extents: of the weights in the budget.
        raw: keep fractions up to the common factor, by site.
        density: cost to be left over the whole, in (0, 1].
        given: site -> keep fraction, for sites that are given rather than solved.
        other: cost in the budget that stays as it is.

    Raises:
        AllocationError: the budget is out of reach, with what can be reached.
    """
    given = dict(given or {})
    sizes = {site.name: site.size for site in sites}
    whole = sum(extent.left(dict.fromkeys(sizes, 1.0)) for extent in extents.values()) + other
    budget = density * whole

    def cost(fractions: Mapping[str, float]) -> float:
        return sum(extent.left(fractions) for extent in extents.values()) + other

    def at(scale: float) -> dict[str, float]:
        solved = {name: min(1.0, max(scale * raw[name], 1.0 / size)) for name, size in sizes.items()}
        return solved | {name: max(fraction, 1.0 / sizes[name]) for name, fraction in given.items()}

    def whole_atoms(fractions: Mapping[str, float]) -> dict[str, int]:
        return {name: max(1, math.floor(fractions[name] * size + 1e-9)) for name, size in sizes.items()}

    def cost_of(kept: Mapping[str, int]) -> float:
        return cost({name: kept[name] / size for name, size in sizes.items()})

    least, most = cost(at(0.0)), cost(at(math.inf))
    slack = 1e-9 * whole
    if not least - slack <= budget <= most + slack:
        raise AllocationError(
            f"a density of {density:.4g} is out of reach by removing channels: between {least / whole:.4g} and "
            f"{most / whole:.4g} is left, with one channel of every group that may shrink and with all; ask for "
            "something in between, or keep fewer layers dense (uniform keeps the first)"
        )
    low, high = 0.0, 1.0 / min(raw.values())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) <= budget else (low, middle)
    fractions = at(high if cost(at(high)) <= budget + slack else low)
    kept = whole_atoms(fractions)
    for name in sorted((n for n in sizes if n not in given), key=lambda n: kept[n] - fractions[n] * sizes[n]):
        more = kept | {name: min(kept[name] + 1, sizes[name])}
        if cost_of(more) <= budget + slack:
            kept = more
    return kept


def given_fractions(sites: Sequence[ChannelSite], sparsities: Mapping[str, float], argument: str) -> dict[str, float]:
    """Site -> keep fraction, from names or globs of weights that make channels to the share of them to remove.

    Raises:
        SelectionError: a name that makes the channels of no site.
        AllocationError: a sparsity outside [0, 1).
    """
    makers = {producer: site.name for site in sites for producer in site.producers}
    found: dict[str, float] = {}
    for pattern, sparsity in sparsities.items():
        matches = [name for name in makers if name == pattern or fnmatchcase(name, pattern)]
        if not matches:
            raise SelectionError(
                f"{argument}: {pattern!r} makes no channels that can be dropped{nearest(pattern, makers)}"
            )
        if not 0.0 <= sparsity < 1.0:
            raise AllocationError(f"{argument}: sparsity {sparsity!r} of {pattern!r} is outside [0, 1)")
        found |= {makers[name]: 1.0 - sparsity for name in matches}
    return found


def kept_elements(extent: Extent, sites: Collection[ChannelSite], kept: Kept) -> int:
    """Elements of a weight that are left, by the sites' numbers of atoms."""
    return round(extent.left({site.name: kept[site.name] / site.size for site in sites}))
