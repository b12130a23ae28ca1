"""Blocks of a weight, against loops over single elements."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxsparse
from fxsparse.core.block_layout import BlockLayout
from fxsparse.core.granularity import Blocks, Channels, Granularity, read_granularity


@st.composite
def layouts(draw):
    groups = draw(st.integers(1, 3))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    dim = draw(st.integers(0, len(shape)))
    shape.insert(dim, groups * draw(st.integers(1, 9)))
    return BlockLayout(tuple(shape), draw(st.integers(1, 6)), dim, groups)


def elements_by_block(layout):
    """Index in the grid -> the indices of the weight in that block, by counting channels off one after the other."""
    blocks, number = {}, -1
    along = layout.shape[layout.dim]
    for channel in range(along):
        within = channel % (along // layout.groups)
        if within % layout.rows == 0:
            number += 1
        others = [range(n) for n in layout.shape]
        others[layout.dim] = range(channel, channel + 1)
        for index in itertools.product(*others):
            at = (*index[: layout.dim], number, *index[layout.dim + 1 :])
            blocks.setdefault(at, []).append(index)
    return blocks


@given(layouts(), st.integers(0, 99))
def test_every_element_is_in_its_block(layout, seed):
    blocks = elements_by_block(layout)
    assert layout.units == len(blocks)
    assert layout.grid == tuple(max(at[dim] for at in blocks) + 1 for dim in range(len(layout.shape)))
    assert layout.even == all(len(indices) == layout.rows for indices in blocks.values())
    values = torch.randn(layout.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    means = layout.mean(values)
    numbers = torch.arange(layout.units).view(layout.grid)
    spread = layout.spread(numbers)
    assert spread.shape == layout.shape
    for at, indices in blocks.items():
        assert means[at].item() == pytest.approx(sum(values[i].item() for i in indices) / len(indices))
        assert all(spread[i] == numbers[at] for i in indices)
    assert torch.equal(layout.gather(spread), numbers)


@given(layouts(), st.integers(0, 99))
def test_a_mask_is_whole_until_one_element_of_a_larger_block_flips(layout, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = layout.spread(torch.rand(layout.grid, generator=generator) < 0.5)
    assert layout.is_whole(mask)
    for indices in elements_by_block(layout).values():
        torn = mask.clone()
        torn[indices[-1]] ^= True
        assert layout.is_whole(torn) == (len(indices) == 1)


def test_blocks_of_a_column_by_hand():
    layout = BlockLayout((10, 1), rows=4)
    assert (layout.grid, layout.units, layout.even) == ((3, 1), 3, False)
    # 1..4, 5..8, 9 and 10: the mean of the last is over its own two.
    assert layout.mean(torch.arange(1.0, 11.0).view(10, 1)).flatten().tolist() == [2.5, 6.5, 9.5]
    assert [layout.elements(n) for n in range(4)] == [0, 3, 7, 10]  # a block has 10 / 3 weights on average
    assert layout.describe("fc.weight") == "fc.weight has 10 output channels: blocks of 2 x 4 + 2"
    grouped = BlockLayout((6, 2), rows=2, groups=2)
    assert grouped.mean(torch.arange(12.0).view(6, 2))[:, 0].tolist() == [1.0, 4.0, 7.0, 10.0]
    assert BlockLayout((8, 3), rows=4).describe("x") == ""


def test_means_of_halves_do_not_overflow():
    values = torch.full((4, 2), 60_000.0, dtype=torch.float16)
    assert BlockLayout((4, 2), rows=4).mean(values).tolist() == [[60_000.0, 60_000.0]]


@pytest.mark.parametrize("given", [(4, 1), [4, 1], "4x1", "04x1", Blocks(4)])
def test_blocks_are_read(given):
    assert read_granularity(given) == Blocks(4)
    assert str(Blocks(4)) == "4x1"
    assert read_granularity(str(Blocks(16))) == Blocks(16)


def test_names_are_read():
    assert (read_granularity("weight"), read_granularity("channel")) == (Granularity(), Channels())


@pytest.mark.parametrize("given", ["row", "4", "4x", "-4x1", 4, None, (4,), (4, 1, 1), (4.0, 1), (True, 1), "2-4"])
def test_what_is_no_granularity(given):
    with pytest.raises(fxsparse.ConfigError, match=r"granularity: .* is not one of weight, channel.*such as \(4, 1\)"):
        read_granularity(given)


@pytest.mark.parametrize("given", [(4, 4), "4x2", (0, 1), "0x1", (1, 4)])
def test_shapes_that_no_block_has(given):
    with pytest.raises(fxsparse.ConfigError, match=r"granularity: there are no blocks of .*\(r, 1\) has r output"):
        read_granularity(given)
