"""State files: whole or refused, small, and the later of two states wins."""

import json
import os

import pytest

from fxsparse.core.errors import CheckpointError
from fxsparse.reproduction.state_files import MAX_BYTES, pack, read_head, unpack
from fxsparse.training import train
from fxsparse.training.run_folder import RunFolder


@pytest.fixture
def packed(tmp_path, tiny):
    """A finished run, its state file, and an empty folder to bring it to."""
    run = tiny("RigL")
    train(run.config, tmp_path / "run", progress=False, say=lambda line: None)
    folder = RunFolder(tmp_path / "run")
    path = tmp_path / "states" / f"{run.name}.state"
    pack(run.name, folder, path)
    return folder, path, RunFolder(tmp_path / "elsewhere")


def test_there_and_back(packed):
    folder, path, elsewhere = packed
    head = unpack(path, elsewhere)
    assert (head.name, head.step) == ("tiny-rigl-seed0", 10)
    (before,), (after,) = folder.checkpoints(), elsewhere.checkpoints()
    assert after.name == before.name and after.read_bytes() == before.read_bytes()
    assert read_head(path) == head and path.stat().st_size < before.stat().st_size


def test_nothing_is_packed_of_a_run_without_a_checkpoint(tmp_path):
    assert pack("none", RunFolder(tmp_path / "none"), tmp_path / "none.state") is None
    assert list(tmp_path.iterdir()) == []


def test_a_later_state_stays(packed):
    _, path, elsewhere = packed
    later = elsewhere.path / "checkpoints" / "step-00000011.pt"
    later.parent.mkdir(parents=True)
    later.write_bytes(b"later")
    unpack(path, elsewhere)
    assert elsewhere.checkpoints() == [later]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda content: content[:-1], "truncated or damaged"),
        (lambda content: content[: len(content) // 2], "truncated or damaged"),
        (lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], "truncated or damaged"),
        (lambda content: content[:20], "no state file"),
        (lambda content: b"", "no state file"),
        (lambda content: b"PK\x03\x04" + content, "no state file"),
        (lambda content: content.replace(b'"format": 1', b'"format": 9'), "format 9"),
    ],
)
def test_damage_is_named_and_nothing_is_unpacked(packed, damage, told):
    _, path, elsewhere = packed
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=told) as caught:
        unpack(path, elsewhere)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
    assert elsewhere.checkpoints() == []


def test_a_state_that_is_too_large_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    large = folder.path / "checkpoints" / "step-00000001.pt"
    large.parent.mkdir(parents=True)
    large.write_bytes(os.urandom(MAX_BYTES))
    with pytest.raises(CheckpointError, match=r"16\.0 MB, and a state file at most 16") as caught:
        pack("large", folder, tmp_path / "large.state")
    assert str(large) in str(caught.value) and not (tmp_path / "large.state").exists()


def test_the_folder_refuses(packed, tmp_path):
    folder, _, _ = packed
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"could not write to .*file/states"):
        pack("run", folder, tmp_path / "file" / "states" / "run.state")


@pytest.mark.parametrize(("label", "distribution", "density"), [("dense", None, 1.0), ("SNFS", "erk", 0.2)])
def test_a_state_of_full_size(tmp_path, label, distribution, density, tiny):
    # all of the network but the input channels of its first layer; dense has most weights, SNFS most state
    network = {"model": "wide_resnet22_2", "model_options": {"dropout": 0.3}}
    run = tiny(label, distribution, density, **network, steps=4, batch_size=4, eval_interval=4)
    train(run.config, tmp_path / "run", progress=False, say=lambda line: None)
    head = pack(run.name, RunFolder(tmp_path / "run"), tmp_path / "run.state")
    size = (tmp_path / "run.state").stat().st_size
    assert head.size < size < MAX_BYTES - 2_000_000  # room for the records of 90,000 steps
    assert size > 2_000_000 and json.loads((tmp_path / "run.state").read_bytes().partition(b"\n")[0])["step"] == 4
