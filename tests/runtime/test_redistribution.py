"""Exact counts from shares: by hand, and against water-filling in fractions."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxsparse import ConfigError
from fxsparse.runtime.redistribution import check_redistribution, redistribute


@pytest.mark.parametrize(
    ("total", "shares", "room", "expected"),
    [
        (10, [1, 1], [20, 20], [5, 5]),
        (10, [3, 1, 1], [20, 20, 20], [6, 2, 2]),
        (10, [1, 1, 1], [20, 20, 20], [4, 3, 3]),  # 3 1/3 each; the one left over goes to the first
        (7, [1, 2], [20, 20], [2, 5]),  # 2 1/3 and 4 2/3: the larger remainder gets it
        (10, [8, 1, 1], [4, 20, 20], [4, 3, 3]),  # 8 do not fit; the others share the 6 that are left
        (10, [8, 1, 1], [4, 2, 20], [4, 2, 4]),
        (10, [100, 4, 1], [1, 6, 20], [1, 6, 3]),  # 9 left: 7 1/5 exceed the second one's 6 places as well
        (6, [5, 0, 0], [3, 2, 1], [3, 2, 1]),
        (5, [1, 0, 0], [2, 4, 2], [2, 2, 1]),  # 3 left, in proportion to room 4 : 2
        (6, [0, 0], [6, 3], [4, 2]),  # nobody has a share: in proportion to room
        (0, [1, 2], [3, 3], [0, 0]),
        (0, [], [], []),
        (3, [0.25], [3], [3]),
        (3, [2, 1], [0, 3], [0, 3]),  # the first is dense
        (1, [1e-300, 1e-300], [1, 1], [1, 0]),
    ],
)
def test_by_hand(total, shares, room, expected):
    assert redistribute(total, shares, room) == expected


def water_filled(total, shares, room):
    """Real-valued amounts: proportional to shares, none above its room (bisection-free, one layer at a time)."""
    shares, amounts, left = [Fraction(s) for s in shares], [Fraction(0)] * len(room), Fraction(total)
    for weights in (shares, [Fraction(r) for r in room]):
        active = {i for i in range(len(room)) if weights[i] > 0 and amounts[i] < room[i]}
        while active and left > 0:
            # The level at which the first of them is full, or at which nothing is left.
            level = min(
                min((room[i] - amounts[i]) / weights[i] for i in active), left / sum(weights[i] for i in active)
            )
            for i in active:
                amounts[i] += level * weights[i]
                left -= level * weights[i]
            active = {i for i in active if amounts[i] < room[i]}
    return amounts


@st.composite
def layer_sets(draw):
    n = draw(st.integers(1, 6))
    room = draw(st.lists(st.integers(0, 60), min_size=n, max_size=n))
    share = st.one_of(st.just(0.0), st.integers(1, 9).map(float), st.floats(1e-6, 1e3))
    shares = draw(st.lists(share, min_size=n, max_size=n))
    return draw(st.integers(0, sum(room))), shares, room


@given(layer_sets())
def test_against_water_filling(case):
    total, shares, room = case
    counts = redistribute(total, shares, room)
    assert sum(counts) == total
    assert all(0 <= count <= places for count, places in zip(counts, room, strict=True))
    exact = water_filled(total, shares, room)
    # Rounding moves less than one connection a layer, in each of the two rounds: by share, then by room.
    slack = 1 if all(s > 0 for s in shares) or not any(s * r for s, r in zip(shares, room, strict=True)) else 2
    for count, amount in zip(counts, exact, strict=True):
        assert abs(count - amount) < slack + Fraction(1, 10**6)


@given(layer_sets())
def test_nothing_full_is_proportional(case):
    total, shares, room = case
    positive = [(s, r) for s, r in zip(shares, room, strict=True) if s > 0]
    if not positive:
        return
    shares = [s for s, _ in positive]
    counts = redistribute(total, shares, [total + 1] * len(shares))
    scale = sum(Fraction(s) for s in shares)
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - Fraction(share) * total / scale) < 1 + Fraction(1, 10**6)


@given(layer_sets(), st.floats(1e-3, 1e3))
def test_a_larger_share_never_gets_less_from_equal_room(case, factor):
    total, shares, room = case
    shares, room = [shares[0] or 1.0, (shares[0] or 1.0) * (1 + factor)], [total, total]
    small, large = redistribute(total, shares, room)
    assert small <= large


def test_what_does_not_fit_is_an_error_and_not_a_wrong_count():
    with pytest.raises(ValueError, match="7 connections do not fit into 6 free places"):
        redistribute(7, [1, 1], [3, 3])


def test_names_are_checked():
    check_redistribution(None)
    check_redistribution("momentum")
    with pytest.raises(
        ConfigError, match=r"redistribution: 'momentun' is not one of none, gradient, momentum; did you mean mo"
    ):
        check_redistribution("momentun")
