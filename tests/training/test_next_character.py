"""Runs on a text: bits per character by brute force, and everything that a run on images does."""

import dataclasses
import json
import math
import random

import pytest
import torch
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fxsparse
from fxsparse import models
from fxsparse.core.errors import DataError
from fxsparse.training import DivergedError, Result, TrainConfig, checkpoint, classification, summary, train
from fxsparse.training.data.text_batches import row_count
from fxsparse.training.metrics import read_metrics
from fxsparse.training.run_folder import RunFolder

LENGTH = 8


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """12,000 bytes of words drawn at random; the last twentieth has a byte that occurs nowhere before it."""
    draw = random.Random(0)
    words = ["sparse", "dense", "rigl", "set", "mask", "of", "the", "a"]
    letters = " ".join(draw.choice(words) for _ in range(4000)).encode()[:12_000]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_bytes(letters[:11_900] + b"\xff\x00" + letters[11_902:])
    return path


@pytest.fixture(scope="module")
def config(text):
    return TrainConfig(
        data=f"text:{text}",
        model="char-gru",
        model_options={"width": 0.05},
        sequence_length=LENGTH,
        batch_size=16,
        steps=240,
        lr=0.02,
        weight_decay=0.0,
        update_interval=80,
        log_interval=80,
        eval_interval=80,
        threads=1,
        tensorboard=False,
        plots=False,
    )


def run(config, folder, **more):
    return train(config, folder, progress=False, say=lambda line: None, **more)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    lines = []
    return folder, train(config, folder, progress=False, say=lines.append), lines


def bits_one_by_one(model, part):
    """Bits per character of `part` (bytes) under an eager model that sees one character at a time, and the
    share of characters that it gets right. Each row of the layout begins with an empty state."""
    predictions = len(part) - 1
    length = math.ceil(predictions / row_count(predictions, LENGTH))
    nats, right, state = 0.0, 0, None
    with torch.no_grad():
        for place in range(predictions):
            if place % length == 0:
                state = None
            logits, state = model(torch.tensor([[part[place]]]), state)
            nats += float(F.cross_entropy(logits[0].double(), torch.tensor([part[place + 1]])))
            right += int(logits[0, 0].argmax()) == part[place + 1]
    return nats / predictions / math.log(2), right / predictions


def test_an_evaluation_is_the_eager_model_reading_character_by_character(finished, text):
    folder, result, _ = finished
    sparse = checkpoint.load(RunFolder(folder).checkpoints()[-1])["model"]
    model = models.build("char_gru", width=0.05).eval()
    model.load_state_dict({name: value for name, value in sparse.items() if not name.endswith("_mask")})
    content = text.read_bytes()
    bits, accuracy = bits_one_by_one(model, content[11_400:])
    assert row_count(599, LENGTH) == 4 and 599 % 4  # several rows, the last one shorter
    assert result.score == pytest.approx(bits, rel=1e-5) and result.test_accuracy == pytest.approx(accuracy)
    bits, _ = bits_one_by_one(model, content[10_800:11_400])
    assert read_metrics(folder / "metrics.jsonl")[-2]["bits_per_character"] == pytest.approx(bits, rel=1e-5)


def test_it_learns_and_every_figure_is_in_bits(finished):
    folder, result, lines = finished
    records = read_metrics(folder / "metrics.jsonl")
    evaluations = [record for record in records if record["kind"] == "eval"]
    assert [(r["step"], r["split"]) for r in evaluations] == [
        (80, "validation"), (160, "validation"), (240, "validation"), (240, "test"),
    ]  # fmt: skip
    for record in records:
        if record["kind"] in ("train", "eval"):
            assert record["bits_per_character"] == pytest.approx(record["loss"] / math.log(2))
    assert (result.metric, result.higher_is_better) == ("bits per character", False)
    assert result.score == evaluations[-1]["bits_per_character"] == result.test_loss / math.log(2)
    assert result.score < 1.2  # the letters cost 3.62 by how often they occur, 1.23 by the one before them
    best = min(evaluations[:3], key=lambda record: record["bits_per_character"])
    assert (result.best_step, result.best_score) == (best["step"], best["bits_per_character"])
    assert (result.best_loss, result.best_accuracy) == (best["loss"], best["accuracy"])
    assert Result.from_json((folder / "result.json").read_text()) == result
    assert "(10800 characters)" in lines[0] and "240 steps of 16 sequences of 8 characters" in lines[0]
    assert f"test bits per character  {result.score:.4f}" in lines[1] and "accuracy" not in lines[1]
    table = summary.comparison([result])
    assert "test bits per character" in table and f"{result.score:.4f}" in table


def test_the_sparsity_is_kept_and_masks_move_until_the_end(finished):
    _, result, _ = finished
    assert result.sparsity == pytest.approx(0.75, abs=1e-3)
    assert result.rewirings == 2  # at 80 and 160 of 240


def test_costs_are_those_of_sequences(finished):
    """By hand: a character costs every linear weight once, a sequence LENGTH of them."""
    _, result, _ = finished
    embedding, hidden, readout = 6, 26, 13  # 128, 512 and 256 x 0.05, rounded
    weights = 3 * hidden * (embedding + hidden) + hidden * readout + readout * embedding + embedding * 256
    assert result.dense_macs == LENGTH * weights
    assert result.macs == LENGTH * result.active_weights
    # 240 steps of 16 sequences; 2 steps with dense gradients; a MAC is 2 FLOPs, backward costs twice forward
    macs = 240 * 3 * result.macs + 2 * (result.dense_macs - result.macs)
    assert result.training_flops_total == pytest.approx(2 * 16 * macs)
    assert result.training_flops == pytest.approx(macs / (240 * 3 * result.dense_macs))


def test_the_flops_command_counts_a_run_as_the_run_does(finished):
    from fxsparse.cli.subjects import make_subject

    folder, result, _ = finished
    subject = make_subject(None, checkpoint=folder)
    assert fxsparse.count_flops(subject.model, subject.example).macs == result.dense_macs


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dense"},
        {"method": "set", "optimizer": "sgd", "lr": 0.5, "split": (0.8, 0.0, 0.2)},
        {"amp": "bf16", "label_smoothing": 0.1},
        {"amp": "fp16"},
        {"model_options": {"width": 0.05, "tie_embedding": True}, "sequence_length": 1},
        {"flops": 0.5, "schedule": "cosine"},
    ],
    ids=str,
)
def test_options_run(options, config, tmp_path):
    result = run(dataclasses.replace(config, **{"steps": 25, **options}), tmp_path / "run")
    assert math.isfinite(result.score)
    assert result.watched_split == ("test" if "split" in options else "validation")


def test_the_norm_of_the_gradients_is_limited_before_every_step(config, tmp_path):
    norms = []

    def watch(optimizer, *arguments):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))

    handle = register_optimizer_step_pre_hook(watch)
    try:
        for limit in (None, 0.05):
            run(dataclasses.replace(config, method="dense", steps=10, clip_norm=limit), tmp_path / f"{limit}")
    finally:
        handle.remove()
    free, limited = norms[:10], norms[10:]
    assert min(free) > 0.05 and limited == pytest.approx([0.05] * 10, rel=1e-3)


def test_a_run_that_diverges_says_so(config, tmp_path):
    with pytest.raises(DivergedError, match=r"finite.*--lr"):
        run(dataclasses.replace(config, lr=1e30), tmp_path / "run")


def test_a_text_that_cannot_be_had_leaves_no_folder(config, tmp_path):
    with pytest.raises(DataError, match="there is no text"):
        run(dataclasses.replace(config, data=f"text:{tmp_path}/nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_results_of_images_are_scored_by_accuracy(finished):
    _, result, _ = finished
    image = dataclasses.replace(result, metric="accuracy", test_accuracy=0.75)
    assert (image.score, image.higher_is_better) == (0.75, True)
    old = json.loads(image.to_json())
    del old["metric"], old["best_loss"]  # as versions before wrote it
    assert (Result.from_json(json.dumps(old)).score, Result.from_json(json.dumps(old)).metric) == (0.75, "accuracy")
    assert classification.Classification.metric.name == "accuracy"


def test_the_picture_is_in_bits_and_shows_the_fall(finished, tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    from fxsparse.training import plots

    figures = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda figure, path, **more: figures.append(figure))
    folder, result, _ = finished
    assert plots.draw([folder], tmp_path / "picture.png")
    left = figures[0].axes[0]
    assert "bits per character" in left.get_ylabel()
    steps, bits = zip(*left.lines[0].get_xydata().tolist(), strict=True)
    assert steps == (80, 160, 240) and bits[-1] == pytest.approx(result.best_score)
    assert f"{result.score:.4f} at the end" in left.get_legend().get_texts()[0].get_text()
    low, high = left.get_ylim()
    assert low < min(bits) and high > max(bits)
