"""CIFAR-10 and CIFAR-100 in the form that torchvision reads, downloaded where they can be."""

import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive

from fxsparse.core.errors import DataError
from fxsparse.training.data.image_set import ImageSet

CONNECT_SECONDS = 10


def read_or_download(root: Path, kind: type[CIFAR10], way_out: str) -> tuple[ImageSet, ImageSet]:
    """`(train, test)` of `kind` (torchvision's CIFAR10 or CIFAR100) from its folder or archive in `root`.

    What is missing is extracted or downloaded into a temporary folder inside `root` and renamed when whole.
    Raises DataError, with nothing overwritten, for a file that is damaged, and ending in `way_out` when the
    download is out of reach.
    """
    folder, archive = root / kind.base_folder, root / kind.filename
    if not folder.exists():
        if archive.exists() and not check_integrity(archive, kind.tgz_md5):
            raise DataError(f"{archive} is damaged or truncated: remove it, and then {way_out}")
        with scratch_folder(root) as scratch:
            if archive.exists():
                unpack(archive, scratch)
            else:
                with quick_network(f"{kind.__name__.replace('CIFAR', 'CIFAR-')} could not be downloaded", way_out):
                    kind(str(scratch), download=True)
            keep(scratch / kind.base_folder, folder)
    for name, md5 in [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]:
        if not check_integrity(folder / name, md5):
            state = "is damaged or truncated" if (folder / name).exists() else "is missing"
            raise DataError(f"{folder / name} {state}: remove the folder {folder}, and then {way_out}")
    return _image_set(kind(str(root), train=True)), _image_set(kind(str(root), train=False))


def _image_set(data: CIFAR10) -> ImageSet:
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2)
    return ImageSet(pixels, torch.tensor(data.targets))


def unpack(archive: Path, folder: Path) -> None:
    try:
        extract_archive(str(archive), str(folder))
    except OSError as error:
        raise DataError(f"{archive} could not be unpacked: {error.strerror or error}") from error


def keep(finished: Path, target: Path) -> None:
    """Renames a finished folder to its place, unless another process has put it there meanwhile."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(finished, target)
    except OSError as error:
        if not (target.is_dir() and any(target.iterdir())):
            raise DataError(f"{target} cannot be written: {error.strerror or error}") from error


@contextmanager
def scratch_folder(root: Path) -> Iterator[Path]:
    """A temporary folder inside `root` (made if need be), so that renaming out of it is atomic."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".download-", dir=root, ignore_cleanup_errors=True)
    except OSError as error:
        raise DataError(f"{root} cannot be written: {error.strerror or error}") from error
    with scratch as folder:
        yield Path(folder)


@contextmanager
def quick_network(failure: str, way_out: str) -> Iterator[None]:
    """Turns whatever a download raises into one line, and silence of the network into an early failure."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)
    try:
        yield
    except (OSError, RuntimeError, EOFError) as error:
        system = re.search(r"\[Errno -?\d+\] ([^>\n]+)", str(error))
        reason = system[1] if system else (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise DataError(f"{failure} ({reason}): {way_out}") from error
    finally:
        socket.setdefaulttimeout(before)
