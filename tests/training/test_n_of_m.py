"""N of every M weights in the command: the flag, the configuration, checkpoints."""

import dataclasses
import json
import shutil

import pytest
import torch

from fxsparse import ConfigError
from fxsparse.cli import main
from fxsparse.training import TrainConfig, checkpoint, train
from fxsparse.training.run_folder import RunFolder

FLAGS = (
    "--model small-resnet --granularity 2:4 --steps 24 --update-interval 5 --drop-fraction 0.6 "
    "--checkpoint-interval 8 --keep-checkpoints 0 --threads 1 --no-tensorboard --no-plots"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of the command."""
    folder = tmp_path_factory.mktemp("groups") / "run"
    assert main(["train", *FLAGS.split(), "--out", str(folder)]) == 0
    return folder


def final(folder):
    return checkpoint.load(RunFolder(folder).saved(24))["model"]


def test_the_command_trains(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["granularity"] == "2:4" and config["sparsity"] == 0.5
    masks = {key: value for key, value in final(folder).items() if key.endswith("_mask")}
    in_groups = [mask for mask in masks.values() if mask.shape[1] % 4 == 0]
    assert len(in_groups) > 3 and len(in_groups) < len(masks)
    assert all((mask.unflatten(1, (-1, 4)).sum(2) == 2).all() for mask in in_groups)
    assert all(bool(mask.all()) for mask in masks.values() if mask.shape[1] % 4)


def test_a_run_is_resumed_bit_for_bit(folder, tmp_path):
    own = tmp_path / "copy"
    shutil.copytree(folder, own)
    RunFolder(own).saved(24).unlink()
    RunFolder(own).result.unlink()
    train(None, own, resume=True, progress=False, say=lambda line: None)
    assert all(torch.equal(value, final(own)[key]) for key, value in final(folder).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.9}, "sparsity: 0.9, and granularity 2:4 fixes the sparsity of every layer at 0.5"),
        ({"flops": 0.3}, "flops: granularity 2:4 fixes"),
        ({"distribution": "er"}, "distribution: granularity 2:4 fixes"),
        ({"method": "dense"}, "method dense is not for granularity '2:4'"),
        ({"semantics": "report"}, "initial_masks=exact"),
        ({"densities_from": "runs/x"}, "of granularity 2:4, take masks_from"),
        ({"granularity": "4:2"}, "'4:2' is not N of every M weights"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"model": "small_resnet", "granularity": "2:4"} | options)
    assert dataclasses.replace(TrainConfig(granularity="1:4").resolved()).sparsity == 0.75
