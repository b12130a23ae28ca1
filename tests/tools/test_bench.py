"""The benchmarks run, check what they compare, and write what they say."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tools" / "bench.py"


def test_flops_benchmark():
    argv = [sys.executable, SCRIPT, "flops", "--models", "alexnet", "--repeats", "1"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    head, _, row, *_ = done.stdout.splitlines()
    assert "FlopCounterMode ms" in head and row.split()[:2] == ["alexnet", "714,188,480"]


def test_struct_benchmark(tmp_path):
    argv = [sys.executable, SCRIPT, "struct", "--models", "lenet5", "--densities", "0.3", "--formats", "contiguous"]
    argv += ["--batch", "4", "--rounds", "1", "--json", tmp_path / "a" / "s.json", "--write", tmp_path / "a" / "s.md"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "a" / "s.json").read_text())["rows"]
    assert 0.2 < row["achieved"] < 0.5 and row["step_amortised"] > 0
    assert "| lenet5" in (tmp_path / "a" / "s.md").read_text()
