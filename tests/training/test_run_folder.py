"""Whose folder it is, which checkpoints stay, and what `--resume` finds."""

import pytest

from fxsparse.core.errors import CheckpointError, ConfigError
from fxsparse.training import TrainConfig, checkpoint
from fxsparse.training.run_folder import RunFolder, find_resume_point

CONFIG = TrainConfig(steps=50).resolved()


def save(folder, *steps, keep=0):
    with folder.claimed():
        for step in steps:
            folder.save_checkpoint(step, {"step": step, "config": CONFIG.to_json()}, keep)


def kept(folder):
    return [int(path.stem.removeprefix("step-")) for path in folder.checkpoints()]


@pytest.mark.parametrize(("keep", "left"), [(0, [5, 10, 15, 20]), (1, [20]), (2, [15, 20]), (9, [5, 10, 15, 20])])
def test_the_newest_checkpoints_are_kept(tmp_path, keep, left):
    folder = RunFolder(tmp_path / "run")
    save(folder, 5, 10, 15, 20, keep=keep)
    assert kept(folder) == left


def test_checkpoints_of_a_future_that_was_left_go_first(tmp_path):
    folder = RunFolder(tmp_path / "run")
    save(folder, 10, 20, 30)
    save(folder, 15, keep=2)  # the run went on from step 10
    assert kept(folder) == [10, 15]


def test_a_folder_with_a_run_is_not_for_a_new_one(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.require_new()
    (tmp_path / "run").mkdir()
    folder.require_new()
    folder.config.write_text("{}")
    with pytest.raises(ConfigError, match=r"already holds a run.*--resume.*--out"):
        folder.require_new()


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    pytest.importorskip("fcntl")
    folder = RunFolder(tmp_path / "run")
    with (
        folder.claimed(),
        pytest.raises(ConfigError, match="another process"),
        RunFolder(folder.path).claimed(),
    ):
        pass
    with folder.claimed():
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with (
        pytest.raises(ConfigError, match="could not write to the run folder"),
        RunFolder(tmp_path / "file/run").claimed(),
    ):
        pass


def test_half_written_files_of_a_killed_run_are_swept(tmp_path):
    folder = RunFolder(tmp_path / "run")
    save(folder, 5)
    half = folder.checkpoints()[0].with_name(".step-00000010.pt.tmp")
    half.write_text("half")
    with folder.claimed():
        assert not half.exists() and kept(folder) == [5]


def test_resume_finds_the_newest_checkpoint_the_named_one_or_the_start(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.claimed():
        folder.config.write_text(CONFIG.to_json())
    start = find_resume_point(folder.path)
    assert start.payload is None and start.config == CONFIG  # killed before its first checkpoint
    save(folder, 9, 10)
    assert find_resume_point(folder.path).payload["step"] == 10
    named = find_resume_point(folder.checkpoints()[0])
    assert named.payload["step"] == 9 and named.folder.path == folder.path


def test_a_lone_checkpoint_needs_a_folder_to_go_on_in(tmp_path):
    lone = tmp_path / "carried.pt"
    checkpoint.save(lone, {"step": 5, "config": CONFIG.to_json()})
    with pytest.raises(ConfigError, match="--out"):
        find_resume_point(lone)
    assert find_resume_point(lone, tmp_path / "new").folder.path == tmp_path / "new"
    other = RunFolder(tmp_path / "other")
    save(other, 1)
    with pytest.raises(ConfigError, match="already holds a run"):
        find_resume_point(lone, other.path)


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(CheckpointError, match="holds no run"):
        find_resume_point(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find_resume_point(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"sparsity": 7}')
    with pytest.raises(CheckpointError, match=r"config\.json.*sparsity is 7"):
        find_resume_point(tmp_path)
