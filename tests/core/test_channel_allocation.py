"""Numbers of channels under a budget: by hand, against brute force, and what cannot be met."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.core.allocation import RAW_DENSITY
from fxsparse.core.channel_allocation import allocate_channels, extents_of, given_fractions, raw_fractions
from fxsparse.core.channel_sites import ChannelSite, SiteSlices
from fxsparse.core.errors import AllocationError, ConfigError, SelectionError


def chain(*widths, kernel=()):
    """Sites and shapes of layers 0, 1, ... of these widths; the first and the last width do not change."""
    shapes = {f"{i}": (out, inn, *kernel) for i, (inn, out) in enumerate(itertools.pairwise(widths))}
    sites = []
    for i, width in enumerate(widths[1:-1]):
        every = tuple(range(width))
        slices = (SiteSlices(f"{i}", 0, "producer", every, every), SiteSlices(f"{i + 1}", 1, "consumer", every, every))
        sites.append(ChannelSite(f"channels of {i}", (f"{i}",), width, slices))
    return sites, shapes


def left(widths, shapes):
    return sum(
        math.prod((o, i, *shape[2:])) for (i, o), shape in zip(itertools.pairwise(widths), shapes.values(), strict=True)
    )


def test_by_hand():
    sites, shapes = chain(10, 20, 40, 5)
    extents = extents_of(sites, shapes)
    assert extents["1"].left({"channels of 0": 0.5, "channels of 1": 0.25}) == 10 * 10
    # 10 * 20 f + 20 f * 40 f + 40 f * 5 = 400 f + 800 f^2 is half of 1200 at f = 0.65138781...
    kept = allocate_channels(sites, extents, {site.name: 1.0 for site in sites}, 0.5)
    assert kept == {"channels of 0": 13, "channels of 1": 26}  # 13.03 and 26.06
    assert left((10, 13, 26, 5), shapes) == 598  # 14 x 26 and 13 x 27 would be 634 and 616, beyond 600


def test_what_is_left_of_the_budget_is_used():
    sites, shapes = chain(4, 10, 10, 4)
    kept = allocate_channels(sites, extents_of(sites, shapes), {site.name: 1.0 for site in sites}, 0.49)
    # 80 f + 100 f^2 = 88.2 at f = 0.621: 6 and 6 leave 84; 7 and 6 would leave 94, 6 and 7 the same
    assert kept == {"channels of 0": 6, "channels of 1": 6}
    kept = allocate_channels(sites, extents_of(sites, shapes), {site.name: 1.0 for site in sites}, 0.53)
    assert sorted(kept.values()) == [6, 7]  # 94 of at most 95.4


def test_er_and_erk_take_the_root_of_the_density_that_a_weight_would_have():
    sites, shapes = chain(16, 32, 64, 10, kernel=(3, 3))
    for name, density in RAW_DENSITY.items():
        raw = raw_fractions(sites, shapes, name)
        assert raw["channels of 0"] ** 2 == pytest.approx(density((32, 16, 3, 3)))
        assert raw["channels of 1"] ** 2 == pytest.approx(density((64, 32, 3, 3)))
    squared = raw_fractions(sites, shapes, "erk", power=2.0)
    assert squared["channels of 0"] == pytest.approx(RAW_DENSITY["erk"]((32, 16, 3, 3)))
    with pytest.raises(ConfigError, match="distribution: 'erq' is not one of uniform, er, erk; did you mean er"):
        raw_fractions(sites, shapes, "erq")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 12), min_size=3, max_size=5),
    st.floats(0.02, 1.0),
    st.lists(st.floats(0.1, 2.0), min_size=3, max_size=3),
)
def test_the_budget_is_met_and_no_group_is_emptied(widths, density, raw):
    widths = (3, *(width + 1 for width in widths[:-1]), 4)
    sites, shapes = chain(*widths)
    raw = {site.name: value for site, value in zip(sites, itertools.cycle(raw))}
    whole, least = left(widths, shapes), left((3, *[1] * len(sites), 4), shapes)
    extents = extents_of(sites, shapes)
    if density * whole < least * (1 - 1e-9):
        with pytest.raises(AllocationError, match="out of reach"):
            allocate_channels(sites, extents, raw, density)
        return
    kept = list(allocate_channels(sites, extents, raw, density).values())
    assert all(1 <= count <= width for count, width in zip(kept, widths[1:-1], strict=True))
    used = left((3, *kept, 4), shapes)
    assert used <= density * whole * (1 + 1e-9)
    # One more atom in every group that has room would be too much, or nothing has room.
    more = [min(count + 1, width) for count, width in zip(kept, widths[1:-1], strict=True)]
    assert kept == more or left((3, *more, 4), shapes) > density * whole * (1 - 1e-9)


def test_costs_other_than_elements_and_what_stays():
    sites, shapes = chain(8, 16, 8)
    extents = extents_of(sites, shapes, {"0": 1000.0, "1": 3000.0})
    kept = allocate_channels(sites, extents, {"channels of 0": 1.0}, 0.5, other=1000.0)
    assert kept == {"channels of 0": 6}  # 1000 + 4000 k / 16 is at most 2500 up to k = 6
    with pytest.raises(AllocationError, match=r"between 0\.25 and 1 is left"):
        allocate_channels(sites, extents, {"channels of 0": 1.0}, 0.1, other=1000.0)


def test_given_groups_are_not_solved_for():
    sites, shapes = chain(10, 20, 40, 5)
    given = given_fractions(sites, {"0": 0.5}, "explicit")
    assert given == {"channels of 0": 0.5}
    kept = allocate_channels(sites, extents_of(sites, shapes), {s.name: 1.0 for s in sites}, 0.5, given=given)
    assert kept == {"channels of 0": 10, "channels of 1": 33}  # 100 + 15 k is at most 600
    with pytest.raises(SelectionError, match="explicit: '9' makes no channels"):
        given_fractions(sites, {"9": 0.5}, "explicit")
    with pytest.raises(AllocationError, match="outside"):
        given_fractions(sites, {"0": 1.0}, "explicit")
