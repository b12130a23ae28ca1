"""Two gloo processes: the same bits on both ranks, and those of one process on the joined batch, for every method."""

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("ddp_worker.py")

_spec = importlib.util.spec_from_file_location("ddp_worker", WORKER)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks end with: (method, network) -> states."""
    folder = tmp_path_factory.mktemp("ddp")
    logs = [open(folder / f"{rank}.log", "w+") for rank in range(2)]  # noqa: SIM115
    processes = [
        subprocess.Popen([sys.executable, str(WORKER), str(folder), str(rank), "2"], stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    codes = [process.wait(timeout=300) for process in processes]
    for log in logs:
        log.seek(0)
    assert codes == [0, 0], [log.read()[-3000:] for log in logs]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_same(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    else:
        assert a == b, path


def assert_rewired(result, case):
    history = result["rewirer"]["history"]
    changed = sum(sum(record["changed"].values()) for record in history)
    assert result["rewirer"]["step_count"] == worker.STEPS
    assert (len(history) > 0) == (case != "static")
    assert (changed > 0) == (worker.METHODS[case][0] not in ("static", "pruning", "snip"))


@pytest.mark.parametrize("case", [case for case, net in worker.CASES if net == "linears"])
def test_two_ranks_equal_one_process_on_the_joined_batch(ranks, case):
    first, second = (rank[case, "linears"] for rank in ranks)
    assert_same(first, second)
    assert_rewired(first, case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", worker.fxsparse.FxSparseWarning)
        assert_same(first, worker.train(case, "linears"))


@pytest.mark.parametrize("case", worker.METHODS)
def test_two_ranks_of_an_ordinary_network_agree_bit_for_bit(ranks, case):
    first, second = (rank[case, "convolutional"] for rank in ranks)
    assert_same(first, second)
    assert_rewired(first, case)
