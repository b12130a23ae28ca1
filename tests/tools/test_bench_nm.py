"""The 2:4 benchmark without a GPU: it says so; and its measurement runs on the CPU with a stand-in for the kernels."""

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxsparse.kernels import semi_structured

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    argv = [sys.executable, TOOLS / "bench.py", "nm", "--json", tmp_path / "nm.json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not done.stdout and not (tmp_path / "nm.json").exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith("bench nm needs a GPU with 2:4 kernels: backend 'cuda': ")


def test_what_is_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    bench_nm = importlib.import_module("bench_nm")
    cpu = torch.device("cpu")
    own = semi_structured.SemiStructuredKernels("stand-in", cpu, {torch.bfloat16: (16, 16)}, lambda weight: weight)
    monkeypatch.setattr(semi_structured, "find_kernels", lambda device: own)
    monkeypatch.setattr(torch, "compile", lambda net, mode: net)
    arguments = argparse.Namespace(batch=2, layers=1, width=64, dtype="bfloat16", mode="default", rounds=1)
    found = bench_nm.measured(arguments, cpu)
    assert list(found["contenders"]) == [
        f"{name}, {how}" for how in ("eager", "compiled") for name in ("dense", "dense graph", "2:4")
    ]
    assert found["lowered"] == found["weights"] == 4
    assert 0 <= found["difference"] < 0.05
    assert max(found["contenders"][f"{name}, eager"]["faster"] for name in ("dense", "dense graph")) == 1.0
