"""The one file that `fxsparse data cifar10` leaves behind: written whole or not at all, checked when read.

`ROOT/cifar10/cifar10.npz` holds uint8 images (N, 3, 32, 32) and uint8 labels (N,) of both parts, stored
without compression and without pickles; the zip container's CRC-32 finds a flipped bit.
"""

import os
import shlex
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from fxsparse.core.errors import DataError
from fxsparse.training.data.facts import CIFAR10, Facts
from fxsparse.training.data.image_set import ImageSet

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def built_path(root: Path) -> Path:
    return root / "cifar10" / "cifar10.npz"


def build_command(root: Path) -> str:
    """What to type to have the file built."""
    return "`fxsparse data cifar10" + ("`" if root == Path("data") else f" --root {shlex.quote(str(root))}`")


def read_built(path: Path, facts: Facts = CIFAR10) -> tuple[ImageSet, ImageSet]:
    """`(train, test)` from `path`. Raises DataError when it is unreadable, damaged, or not `facts`."""
    way_out = f"remove it and run {build_command(path.parent.parent)} to build it again"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in ARRAYS}
        train = ImageSet(arrays["train_images"], arrays["train_labels"])
        test = ImageSet(arrays["test_images"], arrays["test_labels"])
    except PermissionError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged or truncated: {way_out}") from error
    try:
        facts.check(path, train, test)
    except DataError as error:
        raise DataError(f"{error}: {way_out}") from None
    return train, test


def write_built(path: Path, train: ImageSet, test: ImageSet) -> None:
    """Writes a temporary file beside `path`, flushes it and renames it. Raises DataError (disk full, ...)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(
                file,
                train_images=train.pixels.numpy(),
                train_labels=train.labels.byte().numpy(),
                test_images=test.pixels.numpy(),
                test_labels=test.labels.byte().numpy(),
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # gone after the rename; must not hide what went wrong before it
            temporary.unlink()
