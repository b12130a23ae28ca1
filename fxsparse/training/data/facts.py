"""What is known about each published image set, checked whenever one is read."""

from dataclasses import dataclass
from pathlib import Path

from fxsparse.core.errors import DataError
from fxsparse.training.data.image_set import ImageSet, channel_statistics


@dataclass(frozen=True)
class Facts:
    """Sizes in images; every class has the same share of each part. `means` are those of the training
    part, per channel, of pixels scaled to [0, 1], to four decimals."""

    name: str
    train: int
    test: int
    num_classes: int
    image_shape: tuple[int, int, int]  # channels, height, width in pixels
    means: tuple[float, ...] | None = None
    first_test_labels: tuple[int, ...] = ()

    def check(self, where: Path | str, train: ImageSet, test: ImageSet) -> None:
        """Raises DataError that names `where` and the first fact that does not hold."""
        for part, images, expected in (("training", train, self.train), ("test", test, self.test)):
            if len(images) != expected:
                self._fail(where, f"{len(images)} {part} images instead of {expected}")
            if tuple(images.pixels.shape[1:]) != self.image_shape:
                self._fail(where, f"images of shape {tuple(images.pixels.shape[1:])} instead of {self.image_shape}")
            if expected and not 0 <= int(images.labels.min()) <= int(images.labels.max()) < self.num_classes:
                self._fail(where, f"a {part} label outside 0..{self.num_classes - 1}")
            counts = images.labels.bincount(minlength=self.num_classes).tolist()
            share = expected // self.num_classes
            for label, count in enumerate(counts):
                if count != share:
                    self._fail(where, f"{count} {part} images of class {label} instead of {share}")
        first = tuple(test.labels[: len(self.first_test_labels)].tolist())
        if first != self.first_test_labels:
            self._fail(where, f"test labels beginning {first} instead of {self.first_test_labels}")
        if self.means is not None:
            means = tuple(round(m, 4) for m in channel_statistics(train.pixels)[0])
            if means != self.means:
                self._fail(where, f"channel means {means} instead of {self.means}")

    def _fail(self, where: Path | str, what: str) -> None:
        raise DataError(f"{where} does not hold {self.name}: it has {what}")


CIFAR10 = Facts(
    "CIFAR-10",
    train=50_000,
    test=10_000,
    num_classes=10,
    image_shape=(3, 32, 32),
    means=(0.4914, 0.4822, 0.4465),
    first_test_labels=(3, 8, 8, 0, 6, 6, 1, 6, 3, 1),
)
CIFAR100 = Facts("CIFAR-100", train=50_000, test=10_000, num_classes=100, image_shape=(3, 32, 32))
FASHION_MNIST = Facts("Fashion-MNIST", train=60_000, test=10_000, num_classes=10, image_shape=(1, 28, 28))
