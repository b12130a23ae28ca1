"""Groups of M weights along the input dimension: against plain Python, on every layout in memory."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxsparse
from fxsparse.core.granularity import NofM, read_granularity
from fxsparse.core.group_layout import GroupLayout


def groups_of(shape, of, dim):
    """Lists of indices, one list a group."""
    groups = {}
    for index in itertools.product(*map(range, shape)):
        key = (*index[:dim], index[dim] // of, *index[dim + 1 :])
        groups.setdefault(key, []).append(index)
    return list(groups.values())


@st.composite
def layouts(draw):
    of = draw(st.integers(2, 6))
    keep = draw(st.integers(1, of - 1))
    rank = draw(st.integers(2, 4))
    dim = draw(st.integers(0, rank - 1))
    shape = [draw(st.integers(1, 3)) for _ in range(rank)]
    shape[dim] = of * draw(st.integers(1, 3))
    return GroupLayout(tuple(shape), keep, of, dim)


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_ranks_are_those_of_a_sort(layout, seed, ties, permuted):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(layout.shape, generator=generator)
    score = score.round() if ties else score
    score[torch.rand(layout.shape, generator=generator) < 0.1] = float("nan")
    candidates = torch.rand(layout.shape, generator=generator) < 0.6
    if permuted:  # other strides, the same values
        order = list(range(score.dim()))[::-1]
        score = score.permute(order).contiguous().permute(order)
    ranks = layout.ranks(score, candidates)
    for group in groups_of(layout.shape, layout.of, layout.dim):
        own = [index for index in group if candidates[index]]
        value = {index: float("-inf") if score[index].isnan() else score[index].item() for index in own}
        for place, index in enumerate(sorted(own, key=lambda i: -value[i])):  # stable: the lowest index first
            assert int(ranks[index]) == place


@settings(max_examples=40, deadline=None)
@given(layouts(), st.integers(0, 2**31))
def test_counts_and_the_check(layout, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(layout.shape)
    mask = layout.random_mask(weight, generator)
    for group in groups_of(layout.shape, layout.of, layout.dim):
        assert sum(bool(mask[index]) for index in group) == layout.keep
    assert layout.holds(mask)
    more = GroupLayout(layout.shape, layout.keep, layout.of, layout.dim, exact=False)
    assert more.holds(mask) and more.holds(torch.ones_like(mask)) and not layout.holds(torch.ones_like(mask))
    gone = mask.nonzero()[0].tolist()
    mask[tuple(gone)] = False
    assert not layout.holds(mask) and not more.holds(mask)
    assert int(layout.counts(mask).sum()) == int(mask.sum())


def test_random_masks_are_fair_and_those_of_the_seed():
    layout = GroupLayout((4000, 4), 2, 4)
    mask = layout.random_mask(torch.zeros(4000, 4), torch.Generator().manual_seed(1))
    share = mask.float().mean(0)
    assert ((share - 0.5).abs() < 0.04).all()  # five standard deviations
    again = layout.random_mask(torch.zeros(4000, 4), torch.Generator().manual_seed(1))
    assert torch.equal(mask, again)
    assert layout.random_mask(torch.zeros(4000, 4, device="meta"), torch.Generator()).is_meta


def test_the_strides_of_the_weight_are_kept():
    layout = GroupLayout((6, 8, 3, 3), 2, 4)
    score = torch.randn(6, 8, 3, 3).to(memory_format=torch.channels_last)
    ones = torch.ones_like(score, dtype=torch.bool)
    assert layout.ranks(score, ones).stride() == score.stride()
    assert torch.equal(layout.ranks(score, ones), layout.ranks(score.contiguous(), ones.contiguous()))


def test_spellings():
    assert read_granularity("2:4") == NofM(2, 4)
    assert str(read_granularity("4:8")) == "4:8"
    assert read_granularity("1:4").sparsity == 0.75
    for wrong in ("4:4", "0:4", "5:4"):
        with pytest.raises(fxsparse.ConfigError, match=f"'{wrong}' is not N of every M weights with 1 <= N < M"):
            read_granularity(wrong)
    with pytest.raises(fxsparse.ConfigError, match="nor N of every M weights such as 2:4"):
        read_granularity("2-4")
