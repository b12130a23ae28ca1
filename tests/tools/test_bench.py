"""The benchmark runs and puts both counters side by side."""

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
