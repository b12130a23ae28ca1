"""The contenders' processes, and the competitors' environments."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

TOOLS = Path(__file__).parents[1]
FOLDER = Path(__file__).parents[2] / ".peers"


class Left(Exception):
    """A contender or row is left out; the message says why, in a line."""


@dataclass(frozen=True)
class Environment:
    """What pip installs, step by step, into a virtual environment that sees this one's packages from the last on."""

    name: str
    steps: tuple[tuple[str, ...], ...]
    probe: str
    wheels: bool = False  # pure Python: pip's files are kept in .peers/wheels, and do on a machine without network


ENVIRONMENTS = {
    "openvino": Environment("openvino", (("openvino==2026.4.1", "openvino-telemetry"),), "import openvino"),
    "sparseprop": Environment(
        "sparseprop",
        (("pybind11", "setuptools"), ("--no-build-isolation", "sparseprop==0.1.14")),
        "from sparseprop.modules import SparseConv2d",
    ),
    "rigl-torch": Environment(
        "rigl-torch", (("rigl-torch==0.5.2",),), "from rigl_torch.RigL import RigLScheduler", wheels=True
    ),
    "sparsimony": Environment(
        # its metadata wants Python of at most 3.12.0 and numpy 1; its code runs with newer ones
        "sparsimony",
        (("--ignore-requires-python", "sparsimony==0.1.0"),),
        "from sparsimony.dst.rigl import RigL",
        wheels=True,
    ),
}


def python_of(name: str, install: bool = True) -> str:
    """The interpreter that has a contender; its environment is made where there is none. Raises Left."""
    if name not in ENVIRONMENTS:
        return sys.executable
    if name in _failed:  # once is enough for a run
        raise Left(_failed[name])
    try:
        return _made(name, install)
    except Left as left:
        _failed[name] = str(left)
        raise


_failed: dict[str, str] = {}


def _made(name: str, install: bool) -> str:
    environment, folder = ENVIRONMENTS[name], FOLDER / name
    python, ready = folder / "bin" / "python", folder / ".ready"
    wanted = repr((environment.steps, sys.executable, torch.__version__))
    if ready.exists() and ready.read_text() == wanted:
        return str(python)
    if not install:
        raise Left(f"{name} is not installed")
    print(f"installing {name} into .peers/{name}", file=sys.stderr, flush=True)
    pip = [sys.executable, "-m", "pip", "--python", str(python)] if environment.wheels else [str(python), "-m", "pip"]
    _ran([sys.executable, "-m", "venv", "--clear", *(["--without-pip"] * environment.wheels), str(folder)], folder)
    for step in environment.steps:
        if step is environment.steps[-1]:
            _share(folder)
        source = _downloaded(pip, step, folder) if environment.wheels else ()
        _ran([*pip, "install", "--quiet", "--no-deps", *source, *step], folder)
    _ran([str(python), "-c", environment.probe], folder)
    ready.write_text(wanted)
    return str(python)


def _downloaded(pip: Sequence[str], step: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Where pip finds the step's package: a file that was kept from an earlier time, or is fetched now."""
    kept = FOLDER / "wheels"
    name = step[-1].replace("==", "-").replace("-", "_").rpartition("_")
    if not list(kept.glob(f"{name[0]}-{name[2]}-*.whl")):
        _ran([*pip, "download", "--quiet", "--no-deps", "--dest", str(kept), *step], folder)
    return "--no-index", "--find-links", str(kept)


def _share(folder: Path) -> None:
    """Lets an environment see this one's packages, so that PyTorch is not installed again."""
    (target,) = folder.glob("lib/python*/site-packages")
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (target / "shared.pth").write_text("\n".join([str(Path(torch.__file__).parents[1]), *shared]) + "\n")


def _ran(command: Sequence[str], folder: Path) -> None:
    """SparseProp's build calls `pip` and `python3` by name, so the environment's own come first."""
    path = os.pathsep.join([str(folder / "bin"), os.environ.get("PATH", "")])
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
    except OSError as error:
        raise Left(f"{folder.name} does not install: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        reason = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1])
        raise Left(f"{folder.name} does not install: {reason.strip()[:200]}")


class Worker:
    """A process that loads contenders and times them: the program `module` of one of the benchmarks."""

    module = "bench_sparse.worker"

    def __init__(self, python: str, threads: int) -> None:
        self.log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        paths = [str(TOOLS), str(TOOLS.parent), os.environ.get("PYTHONPATH", "")]
        settings = {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        self.threads = threads
        self.process = subprocess.Popen(
            [python, "-m", self.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **settings},
            start_new_session=True,  # Ctrl-C is for the one who collects the figures
        )

    def load(self, contender: str, case: dict[str, Any]) -> dict[str, Any]:
        """Its number, error and facts. Raises Left."""
        return self.ask({"do": "load", "contender": contender, "case": {**case, "threads": self.threads}})

    def run(self, number: int, seconds: float) -> list[list[list[float]]]:
        return self.ask({"do": "run", "number": number, "seconds": seconds})["turns"]

    def drop(self, number: int) -> None:
        self.ask({"do": "drop", "number": number})

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request. Raises Left."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Left(f"the process ended: {self._last_words()}")
        answer = json.loads(line)
        if "failed" in answer:
            raise Left(answer["failed"])
        return answer

    def _last_words(self) -> str:
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().splitlines() if line.strip()]
        return lines[-1][:200] if lines else f"exit status {self.process.wait()}"

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
