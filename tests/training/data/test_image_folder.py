"""Image folders: PNGs written here, decoded by workers, the same whoever decodes them and when."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from fxsparse.core.errors import DataError
from fxsparse.training.data import Batches, load
from fxsparse.training.data.image_folder import crop_box


def write_images(folder, count, seed, size=(40, 30)):
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for i in range(count):
        pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    path = tmp_path_factory.mktemp("folder")
    for number, name in enumerate(("ant", "bee", "cat")):
        write_images(path / "train" / name, 7, seed=number)
        if name != "ant":
            write_images(path / "val" / name, 2, seed=10 + number)
    return path


@pytest.fixture
def path(pristine, tmp_path):
    import shutil

    return shutil.copytree(pristine, tmp_path / "images")


def batches(images, splits, batch_size=4, **options):
    return Batches(images, batch_size, mean=splits.mean, std=splits.std, **({"workers": 0} | options))


def equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True)
    )


def test_parts_classes_and_sizes(pristine):
    splits = load(f"imagefolder:{pristine}", validation=3)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (18, 3, 4)
    assert (splits.num_classes, splits.channels, splits.image_size) == (3, 3, 224)
    assert splits.train.labels.bincount().tolist() == [6, 6, 6]
    assert splits.test.labels.tolist() == [1, 1, 2, 2]  # numbered as in training, although val has no ants
    assert splits.train.labels.dtype == torch.int64
    assert not set(splits.train.paths) & set(splits.validation.paths)


def test_evaluation_resizes_and_keeps_the_centre_as_torchvision_does(pristine):
    splits = load(f"imagefolder:{pristine}", image_size=14)
    loader = batches(splits.test, splits, shuffle=False, drop_last=False, batch_size=3)
    images = torch.cat([images for images, _ in loader.epoch(0)])
    reference = transforms.Compose(
        [
            transforms.Resize(16),
            transforms.CenterCrop(14),
            transforms.ToTensor(),
            transforms.Normalize(splits.mean, splits.std),
        ]
    )
    expected = torch.stack([reference(Image.open(p)) for p in splits.test.paths])
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_statistics_are_those_of_the_training_images(pristine):
    splits = load(f"imagefolder:{pristine}", image_size=16)
    images = torch.stack([splits.train.decode(i) for i in range(21)]).double() / 255
    assert splits.mean == pytest.approx(images.mean((0, 2, 3)).tolist())
    assert splits.std == pytest.approx(images.std((0, 2, 3), correction=0).tolist())


@pytest.mark.parametrize("start", [0, 2, 5])
def test_workers_and_restarts_do_not_change_a_bit(pristine, start):
    splits = load(f"imagefolder:{pristine}", image_size=16)
    options = {"flip": True, "crop": 4, "seed": 3, "drop_last": False}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    whole = list(batches(splits.train, splits, **options).epoch(1))
    tail = list(batches(splits.train, splits, workers=2, **options).epoch(1, start))
    assert equal(tail, whole[start:])
    assert torch.equal(torch.get_rng_state(), state)


def test_crops_and_flips_change_from_epoch_to_epoch_and_only_on_request(pristine):
    splits = load(f"imagefolder:{pristine}", image_size=16)

    def first(epoch, **options):
        return next(batches(splits.train, splits, shuffle=False, **options).epoch(epoch))[0]

    plain = first(0)
    assert torch.equal(first(0), first(1))
    assert not torch.equal(first(0, crop=4), first(1, crop=4))
    for epoch in range(2):
        for image, original in zip(first(epoch, flip=True), plain, strict=True):
            assert torch.equal(image, original) or torch.equal(image, original.flip(-1))
    flipped = torch.cat([first(epoch, flip=True) for epoch in range(4)])
    assert not torch.equal(flipped, plain.repeat(4, 1, 1, 1))


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (500, 20), (3, 90), (1, 1)])
def test_crop_boxes_lie_inside_and_keep_to_area_and_ratio(size):
    generator = torch.Generator().manual_seed(0)
    width, height = size
    boxes = [crop_box(width, height, generator) for _ in range(300)]
    for top, left, h, w in boxes:
        assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width and h > 0 and w > 0
        if min(size) >= 20:
            assert 0.7 < w / h < 1.45
    if size == (40, 30):
        areas = torch.tensor([h * w / 1200 for _, _, h, w in boxes])
        assert areas.min() < 0.12 and areas.max() > 0.85 and 0.4 < areas.mean() < 0.6


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_in_one_line(path, workers):
    bad = path / "val" / "cat" / "001.png"
    bad.write_bytes(bad.read_bytes()[:-2000])
    splits = load(f"imagefolder:{path}", image_size=16)
    with pytest.raises(DataError, match=r"cat/001\.png is damaged or not an image") as caught:
        list(batches(splits.test, splits, batch_size=2, shuffle=False, workers=workers).epoch(0))
    assert "\n" not in str(caught.value)


def test_a_missing_part_is_named(tmp_path):
    with pytest.raises(DataError, match="train is not a folder with one sub-folder"):
        load(f"imagefolder:{tmp_path}")


def test_an_empty_class_is_named(path):
    (path / "train" / "dog").mkdir()
    with pytest.raises(DataError, match="dog"):
        load(f"imagefolder:{path}")


def test_a_class_that_training_lacks_is_named(path):
    write_images(path / "val" / "dog", 1, seed=0)
    with pytest.raises(DataError, match=r"val/dog is a class that .*train does not have"):
        load(f"imagefolder:{path}")


def test_the_test_folder_stands_in_for_val(path):
    (path / "val").rename(path / "test")
    assert len(load(f"imagefolder:{path}", image_size=8).test) == 4
