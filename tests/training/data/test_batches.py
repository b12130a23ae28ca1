"""Batches: a pure function of (seed, epoch, batch); crops and flips as an image-by-image loop makes them."""

import pytest
import torch
from torchvision.transforms import functional as TF

from fxsparse.core.errors import ConfigError
from fxsparse.training.data import Batches, ImageSet
from fxsparse.training.data.batches import crop_and_flip
from fxsparse.training.data.seeds import stream

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def image_set(count=50, channels=3, size=8):
    pixels = torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(0))
    return ImageSet(pixels.byte(), torch.arange(count))


def batches(images=None, batch_size=8, **options):
    return Batches(images or image_set(), batch_size, mean=MEAN, std=STD, **options)


def equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("start", [0, 1, 4, 6])
def test_an_epoch_from_the_middle_is_the_tail_of_the_whole_epoch(start, drop_last):
    options = {"flip": True, "crop": 2, "drop_last": drop_last, "seed": 3}
    whole = list(batches(**options).epoch(2))
    torch.manual_seed(99)
    tail = list(batches(**options).epoch(2, start))
    assert equal(tail, whole[start:])


def test_epochs_and_seeds_differ_in_order_and_in_augmentation():
    def first(seed, epoch, shuffle):
        return next(batches(flip=True, crop=2, seed=seed, shuffle=shuffle).epoch(epoch))

    for other in ((0, 1), (1, 0)):
        assert not torch.equal(first(0, 0, True)[1], first(*other, True)[1])
        assert not torch.equal(first(0, 0, False)[0], first(*other, False)[0])


def test_batches_of_one_epoch_are_augmented_differently():
    same = ImageSet(image_set(1).pixels.expand(16, -1, -1, -1), torch.zeros(16))
    (first, _), (second, _) = batches(same, crop=2, flip=True).epoch(0)
    assert not torch.equal(first, second)


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(batches(flip=True, crop=2).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("drop_last", "sizes"), [(True, [8] * 6), (False, [8] * 6 + [2])])
def test_every_image_comes_at_most_once_an_epoch(drop_last, sizes):
    loader = batches(drop_last=drop_last)
    labels = [labels for _, labels in loader.epoch(0)]
    assert [len(x) for x in labels] == sizes
    assert len(loader) == len(sizes)
    assert len(torch.cat(labels).unique()) == sum(sizes)


def test_without_shuffling_images_come_in_order_scaled_and_normalised():
    images = image_set()
    pixels, labels = (torch.cat(x) for x in zip(*batches(images, shuffle=False).epoch(4), strict=True))
    assert labels.tolist() == list(range(48))
    assert pixels.dtype == torch.float32 and labels.dtype == torch.int64
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (MEAN, STD))
    torch.testing.assert_close(pixels, ((images.pixels[:48] / 255.0 - mean) / std).float(), rtol=0, atol=2e-6)


def test_crop_and_flip_equal_an_image_by_image_reference():
    """Pad with zeros, cut a window, mirror: what torchvision's RandomCrop and flip do to one image."""
    padding, size = 3, 8
    images = image_set(40, size=size).pixels
    down, right = torch.randint(0, 2 * padding + 1, (2, 40))
    mirrored = torch.rand(40) < 0.5
    found = crop_and_flip(images, padding, down, right, mirrored)
    for i in range(40):
        padded = torch.zeros(3, size + 2 * padding, size + 2 * padding, dtype=torch.uint8)
        padded[:, padding:-padding, padding:-padding] = images[i]
        expected = padded[:, down[i] : down[i] + size, right[i] : right[i] + size]
        assert torch.equal(found[i], expected.flip(-1) if mirrored[i] else expected)


def test_every_window_and_both_directions_are_drawn_evenly():
    """One bright pixel in the middle shows where each window was: 5 x 5 places, half of them mirrored."""
    pixels = torch.zeros(5000, 1, 7, 7, dtype=torch.uint8)
    pixels[:, :, 3, 2] = 255
    loader = Batches(ImageSet(pixels, torch.zeros(5000)), 5000, mean=(0.0,), std=(1.0,), crop=2, flip=True, seed=1)
    places = next(loader.epoch(0))[0].view(5000, -1).argmax(1)
    rows, columns = (places // 7).bincount(minlength=7), (places % 7).bincount(minlength=7)
    assert rows[[0, 6]].sum() == 0 and (rows[1:6] - 1000).abs().max() < 120
    # unmirrored windows put the pixel at columns 0..4, mirrored ones at 2..6, each a tenth of the time
    assert (columns - torch.tensor([500, 500, 1000, 1000, 1000, 500, 500])).abs().max() < 120


def test_padding_is_black_before_normalisation():
    white = ImageSet(torch.full((64, 1, 4, 4), 255, dtype=torch.uint8), torch.zeros(64))
    pixels, _ = next(Batches(white, 64, mean=(0.25,), std=(0.5,), crop=2).epoch(0))
    assert sorted(pixels.unique().tolist()) == [-0.5, 1.5]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 51}, "more than the 50 images"),
        ({"crop": -1}, "crop is -1"),
        ({"mean": (0.5,)}, "3 channels"),
        ({"std": (0.1, 0.0, 0.1)}, "positive"),
    ],
)
def test_impossible_options_are_named(options, told):
    with pytest.raises(ConfigError, match=told):
        Batches(image_set(), **({"batch_size": 8, "mean": MEAN, "std": STD} | options))


def test_a_start_beyond_the_epoch_is_refused_at_once():
    assert list(batches().epoch(0, 6)) == []
    with pytest.raises(ConfigError, match=r"start 7 is not in 0\.\.6"):
        batches().epoch(0, 7)


def one_by_one(images, seed, epoch, number, size, crop, flip):
    """Batch `number` of an epoch by torchvision, image by image, from the streams that `Batches` says it draws from."""
    order = torch.randperm(len(images), generator=stream("order", seed, epoch))
    chosen = order[number * size : (number + 1) * size]
    draws = stream("batch", seed, epoch, number)
    count = len(chosen)
    down, right = torch.randint(0, 2 * crop + 1, (2, count), generator=draws).tolist() if crop else ([0] * count,) * 2
    mirrored = torch.randint(0, 2, (count,), generator=draws).tolist() if flip else [0] * count
    scale = {"mean": [255 * each for each in MEAN], "std": [255 * each for each in STD]}  # of pixels in 0..255
    made = []
    for index, top, left, mirror in zip(chosen.tolist(), down, right, mirrored, strict=True):
        image = TF.crop(TF.pad(images.pixels[index], [crop]), top, left, *images.pixels.shape[2:])
        made.append(TF.normalize((TF.hflip(image) if mirror else image).float(), **scale))
    return torch.stack(made), images.labels[chosen]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("crop", "flip"), [(4, True), (3, False), (0, True), (0, False)])
def test_batches_are_bit_for_bit_those_of_torchvision_image_by_image(crop, flip, channels_last):
    images = image_set(75, size=12)
    options = {"crop": crop, "flip": flip, "drop_last": False, "seed": 11, "channels_last": channels_last}
    found = list(batches(images, 16, **options).epoch(3, 1))
    expected = [one_by_one(images, 11, 3, number, 16, crop, flip) for number in range(1, 5)]
    assert [len(labels) for _, labels in found] == [16, 16, 16, 11]
    assert equal(found, expected)
    if channels_last:
        assert all(pixels.is_contiguous(memory_format=torch.channels_last) for pixels, _ in found)


def test_labels_and_images_that_stay_on_the_cpu_are_sent_batch_by_batch():
    """The meta device has no values, only the sizes."""
    loader = batches(crop=2, flip=True, drop_last=False, device="meta", data_device="cpu")
    shapes = [(pixels.device.type, tuple(pixels.shape), tuple(labels.shape)) for pixels, labels in loader.epoch(0)]
    assert shapes == [("meta", (size, 3, 8, 8), (size,)) for size in [8] * 6 + [2]]
    assert loader.image_set._copies == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("data_device", ["cuda", "cpu"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_gpu_makes_the_same_batches(data_device, channels_last):
    on_cpu = list(batches(flip=True, crop=2).epoch(1))
    options = {"device": "cuda", "data_device": data_device, "channels_last": channels_last}
    on_gpu = [(a.cpu(), b.cpu()) for a, b in batches(flip=True, crop=2, **options).epoch(1)]
    assert equal(on_gpu, on_cpu)
