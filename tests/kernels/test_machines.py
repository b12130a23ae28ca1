"""The kernels as other machines build them, and under the sanitizers. Each builds anew, which takes long."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import relative_error

import fxsparse
from fxsparse.kernels import build

CASES = Path(__file__).with_name("cases.py")
ROOT = str(Path(fxsparse.__file__).parent.parent)

SANITIZERS = ("-O0", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize=vptr")


def run_cases(count, library, target, **variables):
    environment = os.environ | {"PYTHONPATH": ROOT} | variables
    command = [sys.executable, str(CASES), str(count), str(library), str(target)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_agrees(compiled, capability, tmp_path):
    """torch obeys ATEN_CPU_CAPABILITY, and so do the kernels."""
    results = {}
    for name, variables in (("here", {}), (capability, {"ATEN_CPU_CAPABILITY": capability})):
        done = run_cases(150, "-", tmp_path / f"{name}.pt", **variables)
        assert done.returncode == 0, done.stderr[-3000:]
        results[name] = torch.load(tmp_path / f"{name}.pt")
    assert results["here"][0] == build.capability()
    assert results[capability][0] in (capability.upper(), "DEFAULT")  # a machine without it falls back to the default
    for here, there in zip(results["here"][1], results[capability][1], strict=True):
        for mine, other in zip(here, there, strict=True):
            assert relative_error(other, mine) < 1e-5


@pytest.fixture(scope="module")
def sanitizer_libraries():
    """What must be there before Python starts."""
    compiler = build.find_compiler()
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("no compiler that sanitizes")
    paths = []
    for name in ("libasan.so", "libstdc++.so"):
        done = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        paths.append(done.stdout.strip())
        if not Path(paths[-1]).is_absolute():
            pytest.skip(f"the compiler has no {name}")
    return ":".join(paths)


def run_sanitized(folder, libraries, count):
    build.compile_kernels(build.find_compiler(), folder, folder / "kernels.so", SANITIZERS)
    options = {
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }
    return run_cases(count, folder / "kernels.so", folder / "results.pt", LD_PRELOAD=libraries, **options)


@pytest.mark.slow
def test_sanitizers_find_nothing(sanitizer_libraries, tmp_path):
    done = run_sanitized(tmp_path, sanitizer_libraries, 200)
    assert "runtime error" not in done.stderr and "AddressSanitizer" not in done.stderr, done.stderr[-6000:]
    assert done.returncode == 0, done.stderr[-6000:]
