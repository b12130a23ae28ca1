"""Two gloo processes under torchrun: the same masks on both ranks, and those of one process on the joined batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("ddp_worker.py")


def run(out, processes, method, net):
    out.mkdir()
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    )
    command = [sys.executable, *launcher, str(WORKER), str(out), method, net]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return [torch.load(out / f"{rank}.pt") for rank in range(processes)]


def assert_identical(a, b):
    assert a["changed"] == b["changed"] > 0
    assert a["updates"] == b["updates"] == 22  # steps 10, 20, ..., 220, before t_end = 225
    assert list(a["state"]) == list(b["state"])
    for key, value in a["state"].items():
        assert torch.equal(value, b["state"][key]), key


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_two_ranks_equal_one_process_on_the_joined_batch(tmp_path, method):
    first, second = run(tmp_path / "two", 2, method, "linears")
    assert_identical(first, second)
    (alone,) = run(tmp_path / "one", 1, method, "linears")
    assert_identical(first, alone)


def test_two_ranks_of_an_ordinary_network_agree_bit_for_bit(tmp_path):
    first, second = run(tmp_path / "two", 2, "rigl", "convolutional")
    for state in (first["state"], second["state"]):
        for key in list(state):
            if "running" in key or "num_batches" in key:
                del state[key]  # BatchNorm's statistics are of each rank's own half of the batch
    assert_identical(first, second)
