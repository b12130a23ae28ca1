"""Fashion-MNIST from its four idx files, which several places may hold, packed or not.

An idx file is big-endian: a magic number (0x803 images, 0x801 labels), the counts, then one byte a value.
"""

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import FashionMNIST

from fxsparse.core.errors import DataError
from fxsparse.training.data.facts import FASHION_MNIST, Facts
from fxsparse.training.data.image_set import ImageSet
from fxsparse.training.data.torchvision_cifar import keep, quick_network, scratch_folder

STEMS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts them


def read_fashion_mnist(root: Path, facts: Facts = FASHION_MNIST) -> tuple[ImageSet, ImageSet]:
    """`(train, test)` from the first of root/FashionMNIST/raw (torchvision's place), root/fashion-mnist,
    root itself and Debian's folder that has one of the files; else they are downloaded to the first.

    Raises DataError that names a missing or damaged file, or says where to put the files.
    """
    downloaded = root / "FashionMNIST" / "raw"
    places = (downloaded, root / "fashion-mnist", root, DEBIAN)
    folder = next((p for p in places if any(_find(p, stem) for stem in STEMS)), None)
    if folder is None:
        _download(root, downloaded)
        folder = downloaded
    files = []
    for stem in STEMS:
        path = _find(folder, stem)
        if path is None:
            raise DataError(f"{folder / stem}.gz is missing beside the other files of Fashion-MNIST")
        files.append(path)
    train = ImageSet(_images(files[0]), _labels(files[1]))
    test = ImageSet(_images(files[2]), _labels(files[3]))
    facts.check(folder, train, test)
    return train, test


def _find(folder: Path, stem: str) -> Path | None:
    return next((p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()), None)


def _download(root: Path, target: Path) -> None:
    way_out = (
        f"place {', '.join(f'{stem}.gz' for stem in STEMS)} in {root / 'fashion-mnist'}, "
        "or install Debian's package dataset-fashion-mnist"
    )
    with scratch_folder(root) as scratch:
        with quick_network("Fashion-MNIST could not be downloaded", way_out):
            FashionMNIST(str(scratch), download=True)
        keep(scratch / "FashionMNIST" / "raw", target)


def _images(path: Path) -> Tensor:
    return read_idx(path, 0x803, 3)[:, None]


def _labels(path: Path) -> Tensor:
    return read_idx(path, 0x801, 1)


def read_idx(path: Path, magic: int, dimensions: int) -> Tensor:
    """The uint8 tensor of an idx file, `.gz` or plain. Raises DataError that names the file."""
    advice = "get it again"
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except PermissionError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or truncated: {advice}") from error
    header = np.frombuffer(data[: 4 * (1 + dimensions)], dtype=">u4") if len(data) >= 4 * (1 + dimensions) else [0]
    if header[0] != magic:
        raise DataError(f"{path} does not begin with the magic number {magic:#x} of its kind: {advice}")
    shape = [int(n) for n in header[1:]]
    values = len(data) - 4 * (1 + dimensions)
    if values != prod(shape):
        raise DataError(f"{path} has {values} values instead of {prod(shape)}; it is damaged or truncated: {advice}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=len(data) - values).view(shape).clone()
