"""Splits in proportion, exact statistics, resizing."""

import numpy as np
import pytest
import torch

from fxsparse.core.errors import ConfigError
from fxsparse.training.data import ImageSet
from fxsparse.training.data.image_set import channel_statistics, stratified_split


def test_a_split_takes_the_same_share_of_every_class():
    labels = torch.arange(50_000) % 10
    kept, held = stratified_split(labels, 5_000, seed=0)
    assert labels[kept].bincount().tolist() == [4_500] * 10
    assert labels[held].bincount().tolist() == [500] * 10
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(50_000))


def test_shares_are_rounded_by_largest_remainder():
    labels = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)  # a quarter and a bit: 2.0, 1.2, 0.8 of 4
    _, held = stratified_split(labels, 4, seed=7)
    assert labels[held].tolist() == [0, 0, 1, 2]
    _, held = stratified_split(torch.tensor([0, 0, 1, 1]), 1, seed=7)  # a tie goes to the lowest class
    assert len(held) == 1 and held[0] < 2


def test_the_seed_alone_decides_which_images_are_held_out():
    labels = torch.arange(100) % 4
    torch.manual_seed(1)
    first = stratified_split(labels, 20, seed=3)[1]
    torch.manual_seed(2)
    assert torch.equal(first, stratified_split(labels, 20, seed=3)[1])
    assert not torch.equal(first, stratified_split(labels, 20, seed=4)[1])


def test_statistics_equal_numpys_in_double_precision():
    pixels = torch.randint(0, 256, (2500, 3, 5, 5), generator=torch.Generator().manual_seed(0)).byte()
    pixels[:, 1] //= 3
    mean, std = channel_statistics(pixels)
    scaled = pixels.numpy().astype(np.float64) / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)), abs=1e-12)
    assert std == pytest.approx(scaled.std((0, 2, 3)), abs=1e-12)


def test_a_constant_channel_has_std_one():
    assert channel_statistics(torch.full((4, 1, 2, 2), 51, dtype=torch.uint8)) == ((0.2,), (1.0,))


def test_resizing_keeps_constants_and_repeats_pixels():
    pixels = torch.tensor([[[[0, 0], [200, 200]]], [[[7, 7], [7, 7]]]], dtype=torch.uint8)
    resized = ImageSet(pixels, torch.tensor([0, 1])).resized(4)
    assert resized.pixels.shape == (2, 1, 4, 4) and resized.pixels.dtype == torch.uint8
    assert resized.pixels[0, 0, :, 0].tolist() == [0, 50, 150, 200]
    assert resized.pixels[1].unique().tolist() == [7]


def test_a_size_that_cannot_fit_in_memory_is_refused():
    images = ImageSet(torch.zeros(50_000, 3, 1, 1, dtype=torch.uint8), torch.zeros(50_000))
    with pytest.raises(ConfigError, match=r"image_size 224 .* at most 169"):
        images.resized(224)
