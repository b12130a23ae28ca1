"""A small labelled image set held in memory, its split, its statistics and its size."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fxsparse.core.errors import ConfigError
from fxsparse.training.data.seeds import stream

MAX_BYTES = 4 * 2**30  # of one resized set in memory


class ImageSet:
    """Images as one uint8 tensor `pixels` (N, C, H, W), classes as one int64 tensor `labels` (N,)."""

    def __init__(self, pixels: Tensor, labels: Tensor):
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or labels.shape != pixels.shape[:1]:
            raise ValueError(f"{pixels.dtype} images {tuple(pixels.shape)}, labels {tuple(labels.shape)}")
        self.pixels = pixels.contiguous()
        self.labels = labels.to(torch.int64)
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the images and their labels."""
        return self.pixels.nbytes + self.labels.nbytes

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return self.pixels.shape[-1]

    def subset(self, indices: Tensor) -> "ImageSet":
        """The images at `indices` (int64), copied, in that order."""
        return ImageSet(self.pixels[indices], self.labels[indices])

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`(pixels, labels)` on `device`; the copy is made once, and waited for."""
        if device.type == "cpu":
            return self.pixels, self.labels
        if device not in self._copies:
            self._copies[device] = (self.pixels.to(device), self.labels.to(device))
        return self._copies[device]

    def resized(self, side: int) -> "ImageSet":
        """The set at `side` x `side` pixels (bilinear, antialiased, rounded to uint8).

        Raises ConfigError where the result would not reasonably fit in memory.
        """
        if self.pixels.shape[2:] == (side, side):
            return self
        size = len(self) * self.channels * side * side
        if size > MAX_BYTES:
            largest = int((MAX_BYTES / (len(self) * self.channels)) ** 0.5)
            raise ConfigError(
                f"image_size {side} makes {len(self)} images {size / 2**30:.1f} GiB in memory; "
                f"at most {largest} for this set"
            )
        chunks = [
            F.interpolate(c.float(), (side, side), mode="bilinear", antialias=True).round_().clamp_(0, 255).byte()
            for c in self.pixels.split(2048)
        ]
        return ImageSet(torch.cat(chunks), self.labels)


def stratified_split(labels: Tensor, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """`(kept, held_out)`: ascending int64 indices that share `labels` out, class by class.

    Each class gives its proportional part of `held_out`, rounded by largest remainder (ties to the lowest
    class), and which of its images these are is a seeded permutation.
    """
    classes, counts = labels.unique(return_counts=True)
    quotas = counts * held_out
    take = quotas // len(labels)
    missing = held_out - int(take.sum())
    take[torch.argsort(quotas % len(labels), descending=True, stable=True)[:missing]] += 1
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label, count in zip(classes.tolist(), take.tolist(), strict=True):
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=stream("split", seed, label))
        chosen[members[order[:count]]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def channel_statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel `(mean, std)` of uint8 `pixels` (N, C, H, W) scaled to [0, 1]; the sums are exact.

    A constant channel gets std 1, so that normalising by it stays finite.
    """
    total = torch.zeros(pixels.shape[1], dtype=torch.int64)
    squares = torch.zeros_like(total)
    for chunk in pixels.split(1024):
        values = chunk.to(torch.int32)
        total += values.sum((0, 2, 3))
        squares += values.square_().sum((0, 2, 3))
    count = max(1, pixels.numel() // pixels.shape[1])
    mean = total.double() / count
    std = (squares.double() / count - mean.square()).clamp(min=0).sqrt() / 255
    std[std == 0] = 1.0
    return tuple((mean / 255).tolist()), tuple(std.tolist())
