"""Builds the C++ kernels and keeps them in a cache folder, one build for each thing that a build depends on.

`kernel_library()` is the way in: the path of a shared library that fits this machine, this torch and these sources,
compiled if there is none yet. Compilers are called directly, with the paths that `torch.utils.cpp_extension` knows:
its own `load` waits for ever for a build that was killed.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import torch

from ..core.errors import FxSparseError

SOURCES = Path(__file__).parent / "csrc"

COMPILERS = ("g++", "c++", "clang++")
"""Tried in this order unless `CXX` names one. GCC first: its OpenMP library is the one that torch brings."""

FLAGS = ("-std=c++20", "-O3", "-fPIC")

CAPABILITY_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
"""Compiler flags by `torch.backends.cpu.get_cpu_capability()`; the vector classes of ATen go by the macros."""

TIMEOUT = 900
"""Seconds after which a compiler is taken to hang."""


class BuildError(FxSparseError):
    """The kernels could not be built; says why."""


def capability() -> str:
    """Instruction set that the kernels are compiled for: "AVX512", "AVX2" or "DEFAULT" (NEON where there is one)."""
    found = torch.backends.cpu.get_cpu_capability()
    return found if found in CAPABILITY_FLAGS else "DEFAULT"


def cache_folder() -> Path:
    """Where fxsparse keeps what it can make again: `FXSPARSE_CACHE`, or `fxsparse` in the system's folder for that."""
    if named := os.environ.get("FXSPARSE_CACHE"):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path("~/Library/Caches/fxsparse").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fxsparse"


@contextmanager
def kernel_library(*, anew: bool = False) -> Iterator[Path]:
    """The built library; in a cache that cannot be written, a temporary one that is gone after the `with`.

    Args:
        anew: builds although there is a build, which then is replaced (it does not load).

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    compiler = find_compiler()
    try:
        folder = cache_folder() / "kernels" / _name()
    except RuntimeError as error:  # there is no home folder
        raise BuildError(f"no cache folder: {error}; set FXSPARSE_CACHE") from error
    library = folder / f"kernels-{_digest(compiler_version(compiler))}.so" if compiler else None
    if not anew and (found := _existing(folder, library)):
        yield found
        return
    if compiler is None or library is None:
        raise BuildError(f"no C++ compiler found ({os.environ.get('CXX') or ', '.join(COMPILERS)})")
    with _workplace(folder) as place:
        if place is None:
            with tempfile.TemporaryDirectory(prefix="fxsparse-") as temporary:
                compile_kernels(compiler, Path(temporary), Path(temporary) / library.name)
                yield Path(temporary) / library.name
            return
        if anew or not library.exists():  # another process may have built it while this one waited
            with tempfile.TemporaryDirectory(prefix="build-", dir=place) as temporary:
                compile_kernels(compiler, Path(temporary), Path(temporary) / library.name)
                os.replace(Path(temporary) / library.name, library)
        yield library


def find_compiler() -> list[str] | None:
    """The compiler's command, `CXX` or the first of `COMPILERS` that is installed."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named if shutil.which(named[0]) else None
    return next(([name] for name in COMPILERS if shutil.which(name)), None)


def compiler_version(compiler: list[str]) -> str:
    """What the compiler says of itself."""
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler[0]} --version: {error}") from error
    return f"{shlex.join(compiler)} {done.stdout}"


def compile_kernels(compiler: list[str], folder: Path, library: Path, flags: tuple[str, ...] = ()) -> None:
    """Compiles the sources, at the same time, in `folder`, and links them into `library`.

    Raises:
        BuildError: with the compiler's first error.
    """
    say("building the sparse kernels, about a minute, once")
    cpp_extension = _cpp_extension()
    # as system folders, torch's headers give no warnings
    includes = [part for path in cpp_extension.include_paths("cpu") for part in ("-isystem", path)]
    objects = [folder / f"{source.stem}.o" for source in _sources()]
    commands = [
        [*compiler, *compile_flags(), *flags, *includes, "-c", str(source), "-o", str(target)]
        for source, target in zip(_sources(), objects, strict=True)
    ]
    folders = [f"-L{path}" for path in cpp_extension.library_paths("cpu")]
    link = [*compiler, *_link_flags(), *flags, *map(str, objects), "-o", str(library), *folders]
    begun = time.monotonic()
    _run(commands, folder)
    _run([[*link, "-ltorch", "-ltorch_cpu", "-lc10"]], folder)
    say(f"built the sparse kernels for {capability()} in {time.monotonic() - begun:.0f} s")


def compile_flags() -> list[str]:
    """Flags of every source: the instruction set, and where torch has it, OpenMP for `at::parallel_for`."""
    macros = [f"-DCPU_CAPABILITY={capability()}", f"-DCPU_CAPABILITY_{capability()}"]
    threads = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has none: one thread there
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return [*FLAGS, *CAPABILITY_FLAGS.get(capability(), ()), *macros, *threads, abi]


def say(line: str) -> None:
    print(f"fxsparse: {line}", file=sys.stderr, flush=True)


def _cpp_extension() -> Any:
    """Imported where something is built: it takes long, and says on the way which CUDA it would use."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        from torch.utils import cpp_extension
    finally:
        logging.disable(disabled)
    return cpp_extension


def _link_flags() -> list[str]:
    return ["-dynamiclib", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-fopenmp"]


def _sources() -> list[Path]:
    return sorted(SOURCES.glob("*.cpp"))


def _name() -> str:
    """What a build depends on but the compiler, in short: without a compiler, a build by any will do."""
    texts = [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cpp")]
    kind = f"{sys.platform} {platform.machine()} {torch.__version__} {torch.version.git_version}"
    digest = _digest(kind, *compile_flags(), *_link_flags(), *(text.decode() for text in texts))
    return f"{capability().lower()}-torch{torch.__version__.split('+')[0]}-{digest}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _existing(folder: Path, library: Path | None) -> Path | None:
    with suppress(OSError):
        if library is not None:
            return library if library.exists() else None
        return next(iter(sorted(folder.glob("kernels-*.so"))), None)
    return None


@contextmanager
def _workplace(folder: Path) -> Iterator[Path | None]:
    """The folder, locked by the operating system, which frees it should this process die; None if nothing can be
    written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        say(
            f"cannot write to {folder} ({error.strerror}), so the kernels are built for this process alone; "
            "set FXSPARSE_CACHE to a folder that can be written to"
        )
        yield None
        return
    lock = filelock.FileLock(folder / "lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        say("another process is building the sparse kernels: waiting for it")
        with suppress(filelock.Timeout):  # whoever hangs is not waited for: two builds do no harm, the last one stays
            lock.acquire(timeout=2 * TIMEOUT)
    except (OSError, NotImplementedError):
        pass  # a file system without locks: several may build
    try:
        if lock.is_locked:
            for left in folder.glob("build-*"):  # by a build that was killed
                shutil.rmtree(left, ignore_errors=True)
        yield folder
    finally:
        lock.release(force=True)


def _run(commands: list[list[str]], folder: Path) -> None:
    """Runs commands side by side; an error names the first thing that one of them complained about."""
    running: list[subprocess.Popen] = []
    outputs = [folder / f"output{index}" for index in range(len(commands))]
    try:
        for command, output in zip(commands, outputs, strict=True):
            with output.open("w") as file:
                running.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file))
        codes = [process.wait(timeout=TIMEOUT) for process in running]
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{commands[0][0]}: {error}") from error
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
    for command, code, output in zip(commands, codes, outputs, strict=True):
        if code:
            raise BuildError(f"{command[0]} failed: {_cause(output.read_text(errors='replace')) or f'exit {code}'}")


def _cause(output: str) -> str:
    """The first line that tells of an error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")[:300]
