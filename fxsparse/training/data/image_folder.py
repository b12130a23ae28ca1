"""Images that stay on disk, one folder a class, decoded by worker processes.

Every random choice about an image is a pure function of (seed, epoch, index of the image), so it does not
matter which worker decodes it, or in which order.
"""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as TF

from fxsparse.core.errors import DataError
from fxsparse.training.data.image_set import channel_statistics
from fxsparse.training.data.seeds import stream

AREA = (0.08, 1.0)  # of a random crop, as a fraction of the image
RATIO = (3 / 4, 4 / 3)  # width / height of a random crop
EVALUATION_MARGIN = 256 / 224  # shorter side over image_size, before the centre crop
STATISTICS_SAMPLE = 512  # images


class FolderSet:
    """Paths, int64 `labels` (N,); an image is decoded when asked for: uint8 (3, S, S), S = `image_size`.

    To train, a random resized crop is taken (8% to 100% of the area, ratio 3:4 to 4:3); to evaluate, the
    shorter side becomes S * 256 / 224 and the centre is kept.
    """

    channels = 3

    def __init__(self, paths: list[str], labels: Tensor, image_size: int):
        self.paths, self.labels, self.image_size = paths, labels, image_size

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: Tensor) -> "FolderSet":
        """The images at `indices` (int64), in that order."""
        return FolderSet([self.paths[i] for i in indices.tolist()], self.labels[indices], self.image_size)

    def decode(
        self, index: int, *, crop: bool = False, flip: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Image `index` as uint8 (3, S, S): the centre, or with `crop` a random resized crop; with `flip`
        mirrored by chance. Raises DataError that names a file that cannot be decoded."""
        path = self.paths[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} is damaged or not an image: restore it or remove it") from error
        side = self.image_size
        if crop:
            image = TF.resized_crop(image, *crop_box(*image.size, generator), [side, side])
        else:
            image = TF.center_crop(TF.resize(image, [round(side * EVALUATION_MARGIN)]), [side, side])
        if flip and torch.rand((), generator=generator) < 0.5:
            image = TF.hflip(image)
        return TF.pil_to_tensor(image)


def crop_box(width: int, height: int, generator: torch.Generator | None) -> tuple[int, int, int, int]:
    """`(top, left, height, width)` in pixels of a random crop: the rule of torchvision's RandomResizedCrop,
    drawn from `generator` rather than the global state."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))

    for _ in range(10):
        area = width * height * uniform(*AREA)
        ratio = math.exp(uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(uniform(0, height - h + 1)), int(uniform(0, width - w + 1)), h, w
    ratio = min(max(width / height, RATIO[0]), RATIO[1])  # the largest centred crop of an allowed ratio
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def find_images(path: Path, image_size: int) -> tuple[FolderSet, FolderSet, int]:
    """`(train, test, number of classes)` of PATH/train and PATH/val (or PATH/test), one folder a class.

    Raises DataError when a folder is missing or empty, or a class of the test part is not in training.
    """
    train_folder = path / "train"
    test_folder = next((path / name for name in ("val", "test") if (path / name).is_dir()), path / "val")
    train, test = _listing(train_folder), _listing(test_folder)
    strangers = [name for name in test.classes if name not in train.class_to_idx]
    if strangers:
        raise DataError(f"{test_folder / strangers[0]} is a class that {train_folder} does not have")
    numbers = torch.tensor([train.class_to_idx[name] for name in test.classes])
    return (
        FolderSet([p for p, _ in train.samples], torch.tensor(train.targets), image_size),
        FolderSet([p for p, _ in test.samples], numbers[torch.tensor(test.targets)], image_size),
        len(train.classes),
    )


def _listing(folder: Path) -> ImageFolder:
    try:
        return ImageFolder(folder)
    except OSError as error:
        reason = f": {error}" if folder.is_dir() else ""
        raise DataError(f"{folder} is not a folder with one sub-folder of images a class{reason}") from error


def sampled_statistics(images: FolderSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel `(mean, std)` of [0, 1]-scaled pixels over (at most) 512 evenly spaced images."""
    count = min(len(images), STATISTICS_SAMPLE)
    indices = [i * len(images) // count for i in range(count)]
    with ThreadPoolExecutor(usable_cores()) as pool:  # Pillow decodes without the interpreter lock
        return channel_statistics(torch.stack(list(pool.map(images.decode, indices))))


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_workers(wanted: int | None) -> int:
    """Processes that decode images: as many as wanted, or one a core, at most 8."""
    return min(8, usable_cores()) if wanted is None else wanted


class _Epoch(Dataset):
    """What a worker decodes: image `index` of one epoch, or the error that stopped it, as one line."""

    def __init__(self, images: FolderSet, seed: tuple[int, int], crop: bool, flip: bool):
        self.images, self.seed, self.crop, self.flip = images, seed, crop, flip

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | str:
        generator = stream("image", *self.seed, index) if self.crop or self.flip else None
        try:
            pixels = self.images.decode(index, crop=self.crop, flip=self.flip, generator=generator)
        except DataError as error:
            return str(error)  # raised across processes it would carry a page of traceback
        return pixels, self.images.labels[index]


def _stack(samples: list[tuple[Tensor, Tensor] | str]) -> tuple[Tensor, Tensor] | str:
    for sample in samples:
        if isinstance(sample, str):
            return sample
    pixels, labels = zip(*samples, strict=True)
    return torch.stack(pixels), torch.stack(labels)


def decoded_batches(
    images: FolderSet,
    order: list[Tensor],
    *,
    seed: tuple[int, int],
    crop: bool,
    flip: bool,
    workers: int | None,
    pin_memory: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """uint8 images (B, 3, S, S) and int64 labels (B,), on the CPU, for each index tensor of `order`;
    `seed` is (seed, epoch). Raises DataError for a file that cannot be decoded."""
    loader: DataLoader = DataLoader(
        _Epoch(images, seed, crop, flip),
        batch_sampler=[indices.tolist() for indices in order],
        num_workers=usable_workers(workers),
        collate_fn=_stack,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its own, so that the global random state stays what it was
    )
    for batch in loader:
        if isinstance(batch, str):
            raise DataError(batch)
        yield tuple(batch)
