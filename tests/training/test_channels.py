"""Channels in the command: RigL-struct with masks and at the compact size, its record, its checkpoints."""

import dataclasses
import shutil

import pytest
import torch

import fxsparse
from fxsparse import ConfigError
from fxsparse.training import TrainConfig, checkpoint, summary, train
from fxsparse.training.experiment import build
from fxsparse.training.metrics import read_metrics
from fxsparse.training.run_folder import RunFolder

TINY = TrainConfig(
    model="small_resnet",
    method="rigl-struct",
    steps=24,
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


def run(config, folder, **options):
    return train(config, folder, progress=False, say=lambda line: None, **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run with masks and at the compact size: folder and result of each."""
    made = {}
    for compact in (False, True):
        folder = tmp_path_factory.mktemp("channels") / str(compact)
        made[compact] = folder, run(dataclasses.replace(TINY, compact=compact), folder)
    return made


def test_the_compact_run_is_the_masked_one(runs):
    (masked, slow), (compact, fast) = runs[False], runs[True]
    assert fast.metric == slow.metric and fast.score == pytest.approx(slow.score, abs=0.01)
    assert fast.training_flops == slow.training_flops and fast.active_weights == slow.active_weights
    losses = [
        [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "train"]
        for folder in (masked, compact)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(losses[0]) == 6
    rewirings = [
        [record["active"] for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "rewire"]
        for folder in (masked, compact)
    ]
    assert rewirings[0] == rewirings[1] and len(rewirings[0]) == 3


def test_what_the_table_says_is_of_channels(runs):
    for _, result in runs.values():
        assert result.active_channels > 0 and result.density <= result.ever_active <= 1
        assert "of the active channels)" in summary.after(result) and "channels ever active" in summary.after(result)


def test_checkpoints_speak_of_the_full_size(runs):
    shapes = {
        compact: {
            step: {key: value.shape for key, value in checkpoint.load(RunFolder(folder).saved(step))["model"].items()}
            for step in (8, 16, 24)
        }
        for compact, (folder, _) in runs.items()
    }
    assert shapes[False] == shapes[True]
    dense = {key: value.shape for key, value in build(TINY).sparse.state_dict().items()}
    assert shapes[True][16] == dense


@pytest.mark.parametrize("compact", [False, True])
def test_a_run_is_resumed_where_it_stopped(runs, tmp_path, compact):
    folder, result = runs[compact]
    own = tmp_path / "copy"
    shutil.copytree(folder, own)
    RunFolder(own).saved(24).unlink()
    RunFolder(own).result.unlink()
    again = run(None, own, resume=True)
    assert again.score == pytest.approx(result.score, abs=0.01)
    ends = [checkpoint.load(RunFolder(place).saved(24))["model"] for place in (folder, own)]
    for key, value in ends[0].items():
        if compact:
            torch.testing.assert_close(ends[1][key], value, rtol=1e-3, atol=1e-5)
        else:
            assert torch.equal(ends[1][key], value)


def test_static_channels_from_another_runs_masks(runs):
    folder, _ = runs[True]
    sparse = build(dataclasses.replace(TINY, method="static", granularity="channel", masks_from=str(folder))).sparse
    last = checkpoint.load(RunFolder(folder).saved(24))["model"]
    assert all(torch.equal(mask, last[f"{name}_mask"]) for name, mask in sparse.masks.items())


def test_what_is_refused():
    for options, message in (
        ({"method": "snfs", "granularity": "channel"}, "method snfs is not for granularity 'channel'"),
        ({"method": "rigl", "compact": True}, "compact is for granularity channel"),
        ({"granularity": "row"}, "granularity: 'row' is not one of weight, channel, nor"),
        ({"densities_from": "runs/other"}, "densities_from is for single weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(TINY, **options)
    assert fxsparse.methods().index("rigl-struct")
