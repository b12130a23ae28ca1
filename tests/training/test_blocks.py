"""Blocks in the command: the flag, the configuration file, checkpoints and what another run's masks may be."""

import dataclasses
import json
import shutil

import pytest
import torch

from fxsparse import ConfigError, FxSparseError
from fxsparse.cli import main
from fxsparse.training import TrainConfig, checkpoint, train
from fxsparse.training.experiment import build
from fxsparse.training.run_folder import RunFolder

TINY = TrainConfig(
    model="small_resnet",
    granularity="4x1",
    steps=24,
    sparsity=0.8,
    update_interval=5,
    drop_fraction=0.6,
    checkpoint_interval=8,
    keep_checkpoints=0,
    threads=1,
    tensorboard=False,
    plots=False,
)
FLAGS = (
    "--model small-resnet --granularity 4x1 --steps 24 --sparsity 0.8 --update-interval 5 --drop-fraction 0.6 "
    "--checkpoint-interval 8 --keep-checkpoints 0 --threads 1 --no-tensorboard --no-plots"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of the command."""
    folder = tmp_path_factory.mktemp("blocks") / "run"
    assert main(["train", *FLAGS.split(), "--out", str(folder)]) == 0
    return folder


def masks_of(folder):
    state = checkpoint.load(RunFolder(folder).saved(24))["model"]
    return {key: value for key, value in state.items() if key.endswith("_mask")}


def is_whole(mask):
    """Whether each block of 4 rows is of one kind."""
    return all(torch.equal(block, block[:1].expand_as(block)) for block in mask.split(4))


def test_the_command_trains_with_blocks(folder):
    assert json.loads((folder / "config.json").read_text())["granularity"] == "4x1"
    masks = masks_of(folder)
    assert len(masks) > 3 and all(map(is_whole, masks.values()))
    before = {f"{name}_mask": mask for name, mask in build(TINY).sparse.masks.items()}
    assert all(is_whole(mask) and int(mask.sum()) > 0 for mask in before.values())
    assert any(not torch.equal(mask, masks[key]) for key, mask in before.items())


def test_a_run_is_resumed_bit_for_bit(folder, tmp_path):
    own = tmp_path / "copy"
    shutil.copytree(folder, own)
    RunFolder(own).saved(24).unlink()
    RunFolder(own).result.unlink()
    train(None, own, resume=True, progress=False, say=lambda line: None)
    ends = [checkpoint.load(RunFolder(place).saved(24))["model"] for place in (folder, own)]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_the_configuration_reads_all_spellings():
    for given in ("4x1", (4, 1), [4, 1]):
        assert TrainConfig(granularity=given).granularity == "4x1"
    assert TrainConfig.from_json(TINY.to_json()) == TINY
    with pytest.raises(ConfigError, match="--granularity weight contradicts the run to resume, which has 4x1"):
        TINY.changed_by({"granularity": "weight"})


def test_masks_of_another_run(folder):
    sparse = build(dataclasses.replace(TINY, method="static", masks_from=str(folder))).sparse
    assert all(torch.equal(mask, masks_of(folder)[f"{name}_mask"]) for name, mask in sparse.masks.items())
    wider = dataclasses.replace(TINY, method="static", granularity="8x1", masks_from=str(folder))
    with pytest.raises(FxSparseError, match="does not consist of whole blocks of 8x1"):
        build(wider)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "4x4"}, "granularity: there are no blocks of '4x4'"),
        ({"granularity": [4]}, r"granularity: \[4\] is not one of weight, channel"),
        ({"method": "deepr"}, "method deepr is not for granularity '4x1'"),
        ({"compact": True}, "compact is for granularity channel"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **options)
