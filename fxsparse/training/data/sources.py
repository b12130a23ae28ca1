"""The data sets by name: where each comes from, and its division into training, validation and test."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision import datasets

from fxsparse.core.errors import ConfigError, DataError, nearest
from fxsparse.training.data.cifar10_file import build_command, built_path, read_built
from fxsparse.training.data.facts import CIFAR10, CIFAR100
from fxsparse.training.data.fashion_mnist import read_fashion_mnist
from fxsparse.training.data.image_folder import FolderSet, find_images, sampled_statistics
from fxsparse.training.data.image_set import ImageSet, channel_statistics, stratified_split
from fxsparse.training.data.text import PREFIX as TEXT_PREFIX
from fxsparse.training.data.torchvision_cifar import read_or_download

FOLDER_PREFIX = "imagefolder:"
FOLDER_IMAGE_SIZE = 224
DIGITS_TEST = 360  # a fifth of the 1,797 images
DIGITS_SPLIT_SEED = 0


@dataclass
class Splits:
    """A data set in its parts. `mean` and `std` are per channel, of the training part's pixels scaled to
    [0, 1]; `image_size` is in pixels a side."""

    name: str
    train: ImageSet | FolderSet
    test: ImageSet | FolderSet
    validation: ImageSet | FolderSet | None
    num_classes: int
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def names() -> list[str]:
    """What there is: image sets, for `load`, PATH a folder with `train` and `val` (or `test`) inside; and texts,
    for `load_text`, PATH a file."""
    return [*_READERS, f"{FOLDER_PREFIX}PATH", f"{TEXT_PREFIX}PATH"]


def load(
    name: str,
    root: Path | str = "data",
    *,
    validation: int = 0,
    train_images: int | None = None,
    image_size: int | None = None,
    split_seed: int = 0,
) -> Splits:
    """The data set `name`, from `root` or by download to it.

    `validation` images of the training part are set apart, class by class in proportion, by a permutation
    seeded with `split_seed`; of what is left only `train_images` are kept, drawn likewise. `image_size`
    (pixels a side) resizes the images; by default they stay as they are, and a folder's become 224.

    Raises ConfigError for an unknown name or an impossible number, DataError for data that is missing,
    damaged or not what it should be.
    """
    if image_size is not None and image_size < 1:
        raise ConfigError(f"image_size is {image_size}; it is in pixels a side, at least 1")
    train, test, num_classes = _read(name, Path(root).expanduser(), image_size)
    held_out = None
    if validation:
        if not 0 < validation < len(train):
            raise ConfigError(f"validation is {validation}; it must be 0 to {len(train) - 1} of the training images")
        kept, held = stratified_split(train.labels, validation, split_seed)
        train, held_out = train.subset(kept), train.subset(held)
    if train_images is not None:
        if not 0 < train_images <= len(train):
            raise ConfigError(f"train_images is {train_images}; it must be 1 to {len(train)}, the images to train on")
        _, used = stratified_split(train.labels, train_images, split_seed)
        train = train.subset(used)
    mean, std = sampled_statistics(train) if isinstance(train, FolderSet) else channel_statistics(train.pixels)
    return Splits(name, train, test, held_out, num_classes, train.channels, train.image_size, mean, std)


def _read(
    name: str, root: Path, image_size: int | None
) -> tuple[ImageSet, ImageSet, int] | tuple[FolderSet, FolderSet, int]:
    """`(train, test, number of classes)` at `image_size`."""
    if name.startswith(FOLDER_PREFIX) and name != FOLDER_PREFIX:
        path = Path(name.removeprefix(FOLDER_PREFIX)).expanduser()
        return find_images(path, image_size or FOLDER_IMAGE_SIZE)
    if name not in _READERS:
        raise ConfigError(f"unknown data set {name!r}; choose from {', '.join(names())}{nearest(name, _READERS)}")
    train, test, num_classes = _READERS[name](root)
    if image_size is not None:
        train, test = train.resized(image_size), test.resized(image_size)
    return train, test, num_classes


def _digits(root: Path) -> tuple[ImageSet, ImageSet, int]:
    """scikit-learn's 1,797 digits, 8x8 with values 0..16, scaled to 0..255: 1,437 to train, 360 to test,
    stratified, always the same ones."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the data set digits comes with scikit-learn: pip install 'fxsparse[digits]'") from error
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    pixels = (images.double() * 255 / 16).round().byte().view(-1, 1, 8, 8)
    digits = ImageSet(pixels, labels)
    kept, held = stratified_split(digits.labels, DIGITS_TEST, DIGITS_SPLIT_SEED)
    return digits.subset(kept), digits.subset(held), 10


def _cifar10(root: Path) -> tuple[ImageSet, ImageSet, int]:
    built = built_path(root)
    if built.exists():
        return *read_built(built, CIFAR10), 10
    train, test = read_or_download(root, datasets.CIFAR10, f"run {build_command(root)}")
    CIFAR10.check(root / datasets.CIFAR10.base_folder, train, test)
    return train, test, 10


def _cifar100(root: Path) -> tuple[ImageSet, ImageSet, int]:
    kind = datasets.CIFAR100
    train, test = read_or_download(root, kind, f"place {kind.filename} (from {kind.url}) in {root}")
    CIFAR100.check(root / kind.base_folder, train, test)
    return train, test, 100


def _fashion_mnist(root: Path) -> tuple[ImageSet, ImageSet, int]:
    return *read_fashion_mnist(root), 10


_READERS = {"digits": _digits, "cifar10": _cifar10, "cifar100": _cifar100, "fashion-mnist": _fashion_mnist}
