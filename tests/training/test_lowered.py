"""`lower` in the command: the same run on active weights alone, its checkpoints, and when it begins."""

import dataclasses
import shutil

import pytest
import torch

from fxsparse.core.errors import ConfigError, FxSparseError
from fxsparse.lowering.cost_model import CostModel, Estimate
from fxsparse.training import checkpoint
from fxsparse.training.config import TrainConfig
from fxsparse.training.experiment import build
from fxsparse.training.loop import train
from fxsparse.training.metrics import read_metrics
from fxsparse.training.run_folder import RunFolder

TINY = TrainConfig(
    model="small_resnet",
    data="digits",
    steps=24,
    batch_size=32,
    lr=0.02,
    device="cpu",
    sparsity=0.6,
    update_interval=5,
    drop_fraction=0.6,
    log_interval=4,
    checkpoint_interval=8,
    keep_checkpoints=0,
    threads=1,
    tensorboard=False,
    plots=False,
)


@pytest.fixture(autouse=True)
def sparse_is_faster(monkeypatch):
    """The network is too small for the cost model to lower it."""
    monkeypatch.setattr(CostModel, "estimate", lambda *args: Estimate(1.0, 2.0))


def run(config, folder, said=None, **options):
    return train(config, folder, progress=False, say=(lambda line: None) if said is None else said.append, **options)


def losses(folder):
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "train"]


@pytest.mark.parametrize("method, begins", [("rigl", 0), ("set", 0), ("static", 0), ("pruning", 21), ("snip", 1)])
def test_the_lowered_run_is_the_masked_one(method, begins, tmp_path):
    options = {"method_options": {"begin": 5, "end": 20}} if method == "pruning" else {}
    config, said = dataclasses.replace(TINY, method=method, **options), []
    slow = run(config, tmp_path / "masked")
    fast = run(dataclasses.replace(config, lower=True), tmp_path / "lowered", said)
    assert f"lowered at step {begins}: 10 of 10 weights hold active values" in said
    assert losses(tmp_path / "lowered") == pytest.approx(losses(tmp_path / "masked"), rel=1e-3)
    assert fast.active_weights == slow.active_weights and fast.score == pytest.approx(slow.score, abs=0.01)
    states = [checkpoint.load(RunFolder(tmp_path / which).saved(24)) for which in ("masked", "lowered")]
    for key, value in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][key], value, rtol=1e-3, atol=1e-4)
    for key, state in states[0]["optimizer"]["state"].items():
        assert state["momentum_buffer"].shape == states[1]["optimizer"]["state"][key]["momentum_buffer"].shape


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_run_is_resumed_in_either_way(before, after, tmp_path):
    result = run(dataclasses.replace(TINY, lower=before), tmp_path / "run")
    own = tmp_path / "copy"
    shutil.copytree(tmp_path / "run", own)
    for step in (16, 24):
        RunFolder(own).saved(step).unlink()
    RunFolder(own).result.unlink()
    said = []
    again = run(dataclasses.replace(TINY, lower=after), own, said, resume=True)
    assert any(line.startswith("lowered at step 8") for line in said) == after
    assert again.score == pytest.approx(result.score, abs=0.01)
    ends = [checkpoint.load(RunFolder(place).saved(24))["model"] for place in (tmp_path / "run", own)]
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"granularity": "channel"}, "lower is for single weights and blocks; channels are cut out: compact"),
        ({"method": "snfs"}, "snfs reads the dense gradient at every step"),
        ({"method": "rigl-sg"}, "redistribution looks at all sites at once"),
        ({"semantics_options": {"optimizer_state": "kept"}}, "keeps state at inactive positions"),
    ],
)
def test_refused_before_anything_is_made(options, why):
    with pytest.raises(FxSparseError, match=why) as caught:
        dataclasses.replace(TINY, lower=True, **options)
    assert "\n" not in str(caught.value)


def test_another_device_is_refused(monkeypatch):
    monkeypatch.setattr("fxsparse.training.experiment.choose_device", lambda name: torch.device("meta"))
    with pytest.raises(ConfigError, match="lower is for the CPU, and the device is meta"):
        build(dataclasses.replace(TINY, lower=True))


def test_the_option_is_in_the_help(capsys):
    from fxsparse.cli import main

    main(["train", "--help"])
    assert "--lower" in capsys.readouterr().out


def test_that_nothing_is_lowered_is_said_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(CostModel, "estimate", lambda *args: Estimate(2.0, 1.0))
    said = []
    run(dataclasses.replace(TINY, lower=True), tmp_path / "run", said)
    [line] = [line for line in said if line.startswith("lowered at step 0: 0 of 10 weights")]
    assert line.endswith("; dense kernels are estimated faster at these sizes and densities")
