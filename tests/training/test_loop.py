"""The training loop: what it records, and how it stops."""

import dataclasses
import errno
import json
import math
import os
import signal

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fxsparse.core.errors import CheckpointError, ConfigError
from fxsparse.training import DivergedError, TrainConfig, TrainingInterrupted, checkpoint, classification, train
from fxsparse.training.metrics import read_metrics
from fxsparse.training.run_folder import RunFolder

SHORT = TrainConfig(
    model="small_resnet",
    steps=100,
    sparsity=0.9,
    update_interval=20,
    checkpoint_interval=10,
    log_interval=10,
    threads=1,
    tensorboard=False,
    plots=False,
)
TINY = dataclasses.replace(SHORT, model_options={"width": 4}, steps=20, update_interval=6)


def quietly(line):
    pass


def run(config, folder, **more):
    return train(config, folder, progress=False, say=quietly, **more)


def checkpoint_steps(folder):
    return [checkpoint.load(path)["step"] for path in RunFolder(folder).checkpoints()]


@pytest.fixture
def at_step():
    """Calls a function within the given optimizer step, counted from 1, once."""
    handles = []

    def register(step, function, before=False):
        seen = []

        def hook(*arguments):
            seen.append(0)
            if len(seen) == step:
                function(*arguments)

        handles.append((register_optimizer_step_pre_hook if before else register_optimizer_step_post_hook)(hook))

    yield register
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module")
def rigl_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rigl") / "run"
    lines = []
    return folder, train(SHORT, folder, progress=False, say=lines.append), lines


def test_it_learns_and_keeps_the_sparsity_exactly(rigl_run):
    folder, result, _ = rigl_run
    assert result.test_accuracy > 0.9  # ten classes; a constant answer gets 0.1
    state = checkpoint.load(RunFolder(folder).checkpoints()[-1])["model"]
    masks = {name: value for name, value in state.items() if name.endswith("_mask")}
    active, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    assert abs(active - 0.1 * total) <= len(masks)  # up to one element a site
    assert result.active_weights == active and result.sparsity == pytest.approx(1 - active / total)
    for name, mask in masks.items():
        assert not state[name.removesuffix("_mask")][~mask].any()


def test_rewirings_are_recorded_at_the_papers_steps_with_what_changed(rigl_run):
    folder, result, _ = rigl_run
    rewirings = [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "rewire"]
    assert [record["step"] for record in rewirings] == [20, 40, 60]  # multiples of 20, above 0, below 75
    for record in rewirings:
        fraction = 0.3 / 2 * (1 + math.cos(math.pi * record["step"] / 75))
        assert record["drop_fraction"] == pytest.approx(fraction)
        for name, changed in record["changed"].items():
            assert 0 <= changed <= fraction * result.densities[name] * result.active_weights / (1 - result.sparsity)
        assert 0 < sum(record["changed"].values()) <= fraction * result.active_weights
    changes = [sum(record["changed"].values()) for record in rewirings]
    assert result.changed_per_rewiring == pytest.approx(sum(changes) / 3) and result.rewirings == 3


def test_the_folder_holds_the_whole_story(rigl_run):
    folder, result, lines = rigl_run
    assert TrainConfig.from_json((folder / "config.json").read_text()) == SHORT.resolved()
    assert type(result).from_json((folder / "result.json").read_text()) == result
    records = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(10, 101, 10))
    assert [r["step"] for r in records if r["kind"] == "eval"] == [22, 44, 66, 88, 100]  # 22 batches an epoch
    assert records[-1]["accuracy"] == result.test_accuracy
    assert checkpoint_steps(folder) == [100]
    assert b"seconds" not in (folder / "metrics.jsonl").read_bytes()
    assert "sparsity 0.8999" in lines[0] and "planned" in lines[0]
    assert f"{result.test_accuracy:.4f}" in lines[1] and "mask changes" in lines[1]


def test_training_records_are_means_over_all_images_since_the_last_one(tmp_path, monkeypatch):
    losses = []
    real = classification.loss_and_logits

    def recorded(output, labels, label_smoothing):
        loss, logits = real(output, labels, label_smoothing)
        losses.append((loss.item(), float((logits.argmax(1) == labels).float().mean())))
        return loss, logits

    monkeypatch.setattr("fxsparse.training.classification.loss_and_logits", recorded)
    run(dataclasses.replace(TINY, log_interval=8), tmp_path / "run")
    records = [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if r["kind"] == "train"]
    for record, (first, last) in zip(records, [(0, 8), (8, 16), (16, 20)], strict=True):
        mean = torch.tensor(losses[first:last], dtype=torch.float64).mean(0)
        assert [record["loss"], record["accuracy"]] == pytest.approx(mean.tolist(), rel=1e-6)


def test_a_held_out_split_is_watched_and_the_test_images_come_last(tmp_path):
    result = run(dataclasses.replace(TINY, validation=137, eval_interval=8), tmp_path / "run")
    evaluations = [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if r["kind"] == "eval"]
    assert [(r["step"], r["split"]) for r in evaluations] == [
        (8, "validation"), (16, "validation"), (20, "validation"), (20, "test"),
    ]  # fmt: skip
    best = max(r["accuracy"] for r in evaluations if r["split"] == "validation")
    assert (result.watched_split, result.best_accuracy) == ("validation", best)
    assert result.test_accuracy == evaluations[-1]["accuracy"]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dense"},
        {"method": "static", "distribution": "uniform", "optimizer": "adam"},
        {"method": "set", "optimizer": "adamw", "label_smoothing": 0.1},
        {"amp": "bf16"},
        {"amp": "fp16"},
        {"dense": ("first", "last")},
    ],
    ids=str,
)
def test_options_run(options, tmp_path):
    result = run(dataclasses.replace(TINY, **options), tmp_path / "run")
    wanted = 0.0 if options.get("method") == "dense" else 0.9
    slack = 0.1 if options.get("distribution") == "uniform" else 0.01  # uniform keeps the first layer dense
    assert result.sparsity == pytest.approx(wanted, abs=slack)
    assert result.rewirings == (0 if options.get("method") in ("dense", "static") else 2)
    assert math.isfinite(result.test_loss)


def test_the_method_dense_costs_what_dense_costs(tmp_path):
    result = run(dataclasses.replace(TINY, method="dense"), tmp_path / "run")
    assert (result.inference_flops, result.training_flops, result.density) == (1.0, 1.0, 1.0)
    assert result.macs == result.dense_macs


@pytest.mark.slow
def test_it_trains_compiled(tmp_path):
    result = run(dataclasses.replace(TINY, compile=True), tmp_path / "run")
    eager = run(TINY, tmp_path / "eager")
    assert result.test_loss == pytest.approx(eager.test_loss, rel=0.05)


def test_a_folder_that_holds_a_run_is_never_overwritten(rigl_run):
    folder = rigl_run[0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(ConfigError, match="already holds a run"):
        run(SHORT, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_says_how_to_resume(number, tmp_path, at_step):
    expected = run(TINY, tmp_path / "whole")
    at_step(13, lambda *arguments: signal.raise_signal(number))
    before = signal.getsignal(number)
    with pytest.raises(TrainingInterrupted) as caught:
        run(TINY, tmp_path / "run")
    assert str(caught.value).endswith(f"fxsparse train --resume {tmp_path / 'run'}")
    assert caught.value.step == 13 and checkpoint_steps(tmp_path / "run") == [13]
    assert signal.getsignal(number) is before
    resumed = run(None, tmp_path / "run", resume=True)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert resumed.test_loss == expected.test_loss


def test_a_second_ctrl_c_does_not_wait(tmp_path, at_step):
    def twice(*arguments):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(13, twice)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(TINY, tmp_path / "run")
    assert not isinstance(caught.value, TrainingInterrupted) and "step-00000010.pt" in str(caught.value)
    assert checkpoint_steps(tmp_path / "run") == [10]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_last_good_checkpoint(tmp_path, monkeypatch, bad):
    steps, real = [], classification.loss_and_logits

    def spoiled(output, labels, label_smoothing):
        steps.append(0)
        loss, logits = real(output, labels, label_smoothing)
        return (loss * bad if len(steps) >= 13 else loss), logits

    monkeypatch.setattr("fxsparse.training.classification.loss_and_logits", spoiled)
    config = dataclasses.replace(TINY, log_interval=4, checkpoint_interval=5)
    with pytest.raises(DivergedError, match=r"not? .*finite at step 13; .*step-00000010\.pt"):
        run(config, tmp_path / "run")
    assert len(steps) == 15  # found at the next check, which is before the checkpoint
    assert checkpoint_steps(tmp_path / "run") == [10]
    assert not (tmp_path / "run/result.json").exists()


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path, at_step):
    def spoil(optimizer, *arguments):
        optimizer.param_groups[0]["params"][0].data.view(-1)[0] = float("inf")

    at_step(10, spoil)
    with pytest.raises(DivergedError, match=r"after step 10; .*step-00000005\.pt"):
        run(dataclasses.replace(TINY, checkpoint_interval=5, log_interval=20), tmp_path / "run")
    assert checkpoint_steps(tmp_path / "run") == [5]


def test_divergence_by_itself_is_found(tmp_path):
    with pytest.raises(DivergedError, match=r"finite.*--lr"):
        run(dataclasses.replace(TINY, lr=1e30, checkpoint_interval=20), tmp_path / "run")


def test_a_full_disk_leaves_the_last_good_checkpoint_and_the_run_can_go_on(tmp_path, at_step, monkeypatch):
    expected = run(TINY, tmp_path / "whole")
    config = dataclasses.replace(TINY, checkpoint_interval=5)

    def full(path, content):
        raise CheckpointError(f"could not write {path}: {os.strerror(errno.ENOSPC)}")

    with monkeypatch.context() as patch:
        at_step(12, lambda *arguments: patch.setattr(checkpoint, "write_atomically", full))
        with pytest.raises(CheckpointError, match=r"step-00000015\.pt: No space left.*step-00000010\.pt"):
            run(config, tmp_path / "run")
    assert checkpoint_steps(tmp_path / "run") == [10]
    assert run(None, tmp_path / "run", resume=True).test_loss == expected.test_loss


def test_an_unwritable_folder_is_an_error_before_training(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match="could not write to the run folder"):
        run(TINY, tmp_path / "file" / "run")


def test_what_cannot_be_built_leaves_no_folder(tmp_path):
    for options in ({"model": "resnet18"}, {"validation": 5000}, {"model_options": {"depth": 3}}, {"dense": ("nope",)}):
        with pytest.raises(Exception, match=r".") as caught:
            run(dataclasses.replace(TINY, **({"model_options": {}} | options)), tmp_path / "run")
        assert isinstance(caught.value, Exception) and type(caught.value).__module__ == "fxsparse.core.errors"
        assert not (tmp_path / "run").exists()


def test_the_same_configuration_gives_the_same_metrics_and_another_seed_others(tmp_path):
    metrics = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(dataclasses.replace(TINY, seed=seed, tensorboard=name == "b"), tmp_path / name)
        metrics.append((tmp_path / name / "metrics.jsonl").read_text())
    assert metrics[0] == metrics[1] != metrics[2]
    assert json.loads(metrics[0].splitlines()[0])["kind"] == "rewire"
