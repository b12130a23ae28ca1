"""Batches that are a pure function of (seed, epoch, batch), augmented whole on the training device.

The order of epoch e comes from the random stream (seed, e); the crops and flips of its batch b from the
stream (seed, e, b), or (seed, e, index) for an image that is decoded from disk. Streams are drawn on the
CPU, so every device sees the same images, and the global random state is never touched.

What was drawn for an epoch is sent to the device in one piece. A batch is then made of few operations, none of
which the CPU waits for: select the uint8 images, crop and mirror them in one gather, scale and normalise in float32.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fxsparse.core.errors import ConfigError
from fxsparse.training.data.image_folder import FolderSet, decoded_batches
from fxsparse.training.data.image_set import ImageSet
from fxsparse.training.data.placement import send
from fxsparse.training.data.seeds import stream


class Batches:
    """Epochs over an image set.

    `mean` and `std` are per channel, of pixels scaled to [0, 1]. `flip` mirrors every second image, by
    chance. `crop` is the padding in pixels of a random crop back to the image's own size; the padding is
    pixel value 0, before normalisation (torchvision's `RandomCrop(size, padding=crop)`). Images that are
    decoded from disk have no size of their own: any `crop` above 0 asks for random resized crops. They are
    decoded by `workers` processes (default: one a core, at most 8); a set in memory needs none.

    Images come in float32, which autocast rounds to its own type where the network wants it, and with
    `channels_last` in that memory format. `data_device` is where a set in memory lies: the device itself (default),
    or the CPU, from where uint8 batches are sent.

    Raises ConfigError for values that leave no batch or no image.
    """

    def __init__(
        self,
        image_set: ImageSet | FolderSet,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        flip: bool = False,
        crop: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        seed: int = 0,
        device: torch.device | str = "cpu",
        data_device: torch.device | str | None = None,
        channels_last: bool = False,
        workers: int | None = None,
    ):
        _check(image_set, batch_size, mean, std, crop, drop_last)
        self.image_set, self.batch_size = image_set, batch_size
        self.flip, self.crop, self.shuffle, self.drop_last = flip, crop, shuffle, drop_last
        self.seed, self.device, self.workers = seed, torch.device(device), workers
        self.data_device = self.device if data_device is None else torch.device(data_device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        per_channel = (1, -1, 1, 1)
        self._mean = torch.tensor(mean, dtype=torch.float64).mul(255).float().view(per_channel).to(self.device)
        self._std = torch.tensor(std, dtype=torch.float64).mul(255).float().view(per_channel).to(self.device)

    def __len__(self) -> int:
        """Batches per epoch."""
        whole, rest = divmod(len(self.image_set), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def epoch(self, index: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `start`, `start + 1`, ... of epoch `index`: float32 images (B, C, H, W) and int64 labels
        (B,) on the device, the same bits whatever `start` is."""
        if not 0 <= start <= len(self):
            raise ConfigError(f"start {start} is not in 0..{len(self)}, the batches of one epoch")
        source = self._from_disk if isinstance(self.image_set, FolderSet) else self._from_memory
        return source(index, start)

    def order(self, index: int) -> list[Tensor]:
        """The image indices (int64) of every batch of epoch `index`."""
        count = len(self.image_set)
        order = torch.randperm(count, generator=stream("order", self.seed, index)) if self.shuffle else None
        order = torch.arange(count) if order is None else order
        return list(order.split(self.batch_size))[: len(self)]

    def _from_memory(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        assert isinstance(self.image_set, ImageSet)
        pixels, labels = self.image_set.on(self.data_device)
        order = self.order(epoch)[start:]
        if not order:
            return
        drawn = self._draw(epoch, start, order)
        on_device = send(drawn, self.device)
        chosen = on_device[0] if self.data_device == self.device else drawn[0]
        for first in range(0, drawn.shape[1], self.batch_size):
            here = slice(first, first + self.batch_size)
            images, classes = (each.index_select(0, chosen[here]) for each in (pixels, labels))
            if self.data_device != self.device:
                images, classes = send(images, self.device), send(classes, self.device)
            if self.crop or self.flip:
                down, right, mirrored = on_device[1:, here]
                images = crop_and_flip(images, self.crop, down, right, mirrored.bool())
            yield self._normalise(images), classes

    def _draw(self, epoch: int, start: int, order: list[Tensor]) -> Tensor:
        """Rows index, down, right and mirrored of the images of `order`, int64 (4, images), on the CPU."""
        drawn = torch.zeros(4, sum(map(len, order)), dtype=torch.int64)
        torch.cat(order, out=drawn[0])
        if self.crop or self.flip:
            for number, columns in enumerate(drawn.split(self.batch_size, dim=1), start):
                generator = stream("batch", self.seed, epoch, number)
                if self.crop:
                    columns[1:3].random_(0, 2 * self.crop + 1, generator=generator)
                if self.flip:
                    columns[3].random_(0, 2, generator=generator)
        return drawn

    def _from_disk(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        assert isinstance(self.image_set, FolderSet)
        for images, labels in decoded_batches(
            self.image_set,
            self.order(epoch)[start:],
            seed=(self.seed, epoch),
            crop=self.crop > 0,
            flip=self.flip,
            workers=self.workers,
            pin_memory=self.device.type == "cuda",
        ):
            images, labels = (t.to(self.device, non_blocking=True) for t in (images, labels))
            yield self._normalise(images), labels

    def _normalise(self, images: Tensor) -> Tensor:
        images = images.float().sub_(self._mean).div_(self._std)
        return images.contiguous(memory_format=self.memory_format)


def crop_and_flip(images: Tensor, padding: int, down: Tensor, right: Tensor, mirrored: Tensor) -> Tensor:
    """One window of each zero-padded image, some mirrored; all in one gather.

    `images` (B, C, H, W); the window of image i, (H, W) in size, begins at row `down[i]`, column `right[i]`
    (int64, in 0 .. 2 * padding) of the padded image and is mirrored left to right where `mirrored[i]` (bool).
    """
    batch, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device) + down[:, None]
    columns = torch.arange(width, device=images.device) + right[:, None]
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    flat = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    padded = F.pad(images, (padding,) * 4).view(batch, channels, -1)
    window = flat.view(batch, 1, -1).expand(-1, channels, -1)
    return padded.gather(2, window).view(batch, channels, height, width)


def _check(
    image_set: ImageSet | FolderSet,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    crop: int,
    drop_last: bool,
) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
    if len(image_set) == 0:
        raise ConfigError("the image set is empty")
    if drop_last and batch_size > len(image_set):
        raise ConfigError(f"batch_size {batch_size} is more than the {len(image_set)} images of the set")
    if crop < 0:
        raise ConfigError(f"crop is {crop}; it is a padding in pixels, 0 or more")
    if not len(mean) == len(std) == image_set.channels:
        raise ConfigError(f"{len(mean)} means and {len(std)} stds for images of {image_set.channels} channels")
    if not all(s > 0 for s in std):
        raise ConfigError(f"std is {tuple(std)}; every channel's must be positive")
