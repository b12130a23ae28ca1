"""A run that is killed and resumed ends with the bits of the run that was not."""

import dataclasses
import os
import shutil
import subprocess
import sys

import pytest
import torch

from fxsparse.core.errors import CheckpointError, ConfigError
from fxsparse.training import TrainConfig, checkpoint, continue_run, train
from fxsparse.training.run_folder import RunFolder

SHORT = TrainConfig(
    model="small_resnet",
    model_options={"width": 4},
    batch_size=32,
    steps=45,
    sparsity=0.8,
    update_interval=8,
    stop_fraction=0.9,
    milestones=(0.4, 0.8),
    flip=True,
    crop=1,
    log_interval=5,
    eval_interval=11,
    checkpoint_interval=7,
    threads=1,
    tensorboard=False,
    plots=False,
)
DROPOUT = {"model": "wide_resnet22_2", "model_options": {"width": 0.25, "dropout": 0.3}}
CONFIGS = {
    "rigl with momentum": SHORT,
    "dropout": dataclasses.replace(SHORT, **DROPOUT, nesterov=True, schedule="cosine"),
    "set with adamw": dataclasses.replace(SHORT, method="set", optimizer="adamw", warmup_steps=9, validation=200),
    "snfs, the report's": dataclasses.replace(SHORT, method="snfs", semantics="report"),
    "deepr": dataclasses.replace(SHORT, method="deepr", update_interval=5),
    "pruning": dataclasses.replace(SHORT, method="pruning", method_options={"scope": "global"}, keep_steps=(0, 20)),
    "snip over 12 batches": dataclasses.replace(SHORT, method="snip", method_options={"batches": 12}),
    "text": dataclasses.replace(
        SHORT,
        model="char_gru",
        model_options={"width": 0.02},
        data=f"text:{__file__}",
        sequence_length=6,
        optimizer="adam",
        flip=None,
        crop=None,
        clip_norm=0.1,
    ),
}

# The others rewire at 8, 16, 24, 32 and 40. Deep Rewiring has a record every 5 of 45 steps; pruning has 0, 8, 16, 24,
# 32 and its end, 34.
REWIRINGS = {"deepr": 9, "pruning": 6, "snip over 12 batches": 1}

# Every life trains in a process of its own and is killed within its given step, after the optimizer has
# moved the weights and before anything was recorded. The interpreter is started once and forks the lives.
LIVES = """
import os, signal, sys
from pathlib import Path
from torch.optim.optimizer import register_optimizer_step_post_hook
from fxsparse.training import TrainConfig, train

folder, config, steps = sys.argv[1], TrainConfig.from_json(sys.argv[2]), map(int, sys.argv[3:])
for step in steps:
    life = os.fork()
    if life == 0:
        done = 0
        def die(*arguments):
            global done
            done += 1
            if done == step:
                os.kill(os.getpid(), signal.SIGKILL)
        register_optimizer_step_post_hook(die)
        resume = Path(folder, "config.json").exists()
        train(None if resume else config, folder, resume, progress=False, say=lambda line: None)
        os._exit(1)
    _, status = os.waitpid(life, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
"""


def quietly(line):
    pass


def state_of(folder):
    """All that a run ends with, seconds aside: its last checkpoint and its metrics."""
    payload = checkpoint.load(RunFolder(folder).checkpoints()[-1])
    payload.pop("seconds")
    return payload, (folder / "metrics.jsonl").read_bytes()


def assert_same(found, expected, place="state"):
    """Equal bit for bit, with the place of the first difference in the message."""
    assert type(found) is type(expected), place
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), place
    elif isinstance(expected, dict):
        assert list(found) == list(expected), place
        for key in expected:
            assert_same(found[key], expected[key], f"{place}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), place
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{place}[{index}]")
    else:
        assert found == expected, place


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of each run that was left alone, trained when first asked for."""
    root, done = tmp_path_factory.mktemp("uninterrupted"), {}

    def of(name):
        if name not in done:
            done[name] = root / name
            train(CONFIGS[name], done[name], progress=False, say=quietly)
        return done[name]

    return of


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", CONFIGS)
def test_killed_several_times_and_resumed_is_bit_identical(name, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    # killed before the first checkpoint (7); at step 12; at 7 + 17 = 24, a rewiring step; at 21 + 10 = 31
    lives = ["3", "12", "17", "10"]
    command = [sys.executable, "-c", LIVES, str(folder), CONFIGS[name].to_json(), *lives]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in RunFolder(folder).checkpoints()] == ["step-00000028.pt"]
    result = train(None, folder, resume=True, progress=False, say=quietly)
    assert_same(state_of(folder), state_of(uninterrupted(name)))
    assert result.rewirings == REWIRINGS.get(name, 5)  # at 8, 16, 24, 32, 40: two of them after the last resume


def test_the_runs_compared_are_not_trivially_equal(uninterrupted):
    payload, metrics = state_of(uninterrupted("rigl with momentum"))
    assert payload["step"] == 45 and metrics.count(b'"rewire"') == 5
    other = state_of(uninterrupted("dropout"))
    with pytest.raises(AssertionError):
        assert_same((payload, metrics), other)


def test_a_checkpoint_alone_carries_the_run_to_another_folder(uninterrupted, tmp_path):
    name = "rigl with momentum"
    config = dataclasses.replace(CONFIGS[name], keep_checkpoints=0)
    train(config, tmp_path / "run", progress=False, say=quietly)
    carried = tmp_path / "carried.pt"
    shutil.copy(RunFolder(tmp_path / "run").checkpoints()[2], carried)
    shutil.rmtree(tmp_path / "run")
    continue_run(carried, tmp_path / "elsewhere", changes={"keep_checkpoints": 1}, progress=False, say=quietly)
    assert_same(state_of(tmp_path / "elsewhere"), state_of(uninterrupted(name)))


def test_an_earlier_checkpoint_of_a_finished_run_starts_from_there(uninterrupted, tmp_path):
    config = dataclasses.replace(SHORT, keep_checkpoints=0)
    train(config, tmp_path / "run", progress=False, say=quietly)
    expected = state_of(tmp_path / "run")
    continue_run(RunFolder(tmp_path / "run").checkpoints()[0], progress=False, say=quietly)
    assert_same(state_of(tmp_path / "run"), expected)


def test_a_finished_run_is_not_trained_again(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted("rigl with momentum"), folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    lines = []
    result = train(None, folder, resume=True, progress=False, say=lines.append)
    assert "finished already" in lines[0] and result.steps == 45
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_damaged_checkpoint_is_named_and_nothing_is_overwritten(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted("rigl with momentum"), folder)
    (newest,) = RunFolder(folder).checkpoints()
    newest.write_bytes(newest.read_bytes()[:-500])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=newest.name):
        train(None, folder, resume=True, progress=False, say=quietly)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_options_that_would_change_the_result_are_refused(uninterrupted):
    folder = uninterrupted("rigl with momentum")
    with pytest.raises(ConfigError, match=r"--sparsity 0\.5 contradicts the run to resume, which has 0\.8"):
        train(dataclasses.replace(SHORT, sparsity=0.5), folder, resume=True, progress=False, say=quietly)
