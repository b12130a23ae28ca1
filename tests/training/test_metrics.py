"""The record of a run survives a kill at any byte."""

import sys

import pytest

from fxsparse.core.errors import CheckpointError
from fxsparse.training.metrics import MetricLog, read_metrics


def test_a_resumed_log_begins_with_what_the_checkpoint_knew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path)
    log.add("train", 10, loss=0.1 + 0.2, accuracy=1 / 3)
    packed, expected = log.pack(), path.read_bytes()
    log.add("train", 20, loss=0.5)
    with open(path, "a") as file:
        file.write('{"kind": "tra')  # killed in the middle of a line
    again = MetricLog(path, packed)
    assert path.read_bytes() == expected
    assert again.records == [{"kind": "train", "step": 10, "loss": 0.1 + 0.2, "accuracy": 1 / 3}]
    again.add("eval", 20, split="test", accuracy=0.5)
    assert [record["kind"] for record in read_metrics(path)] == ["train", "eval"]


def test_a_new_log_is_empty_and_a_half_written_line_is_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("leftover")
    MetricLog(path).add("train", 1, loss=2.0)
    with open(path, "a") as file:
        file.write('{"kind":')
    assert read_metrics(path) == [{"kind": "train", "step": 1, "loss": 2.0}]


def test_the_last_record_with_given_values(tmp_path):
    log = MetricLog(tmp_path / "metrics.jsonl")
    for step, split in ((1, "test"), (2, "validation"), (3, "test"), (4, "validation")):
        log.add("eval", step, split=split)
    assert log.last("eval", split="test") == {"kind": "eval", "step": 3, "split": "test"}
    assert log.last("rewire") is None


def test_seconds_are_kept_apart(tmp_path):
    log = MetricLog(tmp_path / "metrics.jsonl")
    log.add("train", 1, loss=2.0)
    before = log.path.read_bytes()
    log.add_timing(1, 3.25)
    assert log.path.read_bytes() == before and log.records == read_metrics(log.path)
    assert (tmp_path / "timing.jsonl").read_text() == '{"step": 1, "seconds": 3.25}\n'


def test_a_record_that_cannot_be_written_is_an_error_that_names_the_file(tmp_path):
    log = MetricLog(tmp_path / "metrics.jsonl")
    log.path.unlink()
    log.path.mkdir()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl"):
        log.add("train", 1, loss=2.0)


def test_tensorboard_gets_the_same_numbers(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = MetricLog(tmp_path / "metrics.jsonl")
    assert log.open_tensorboard(tmp_path / "tensorboard", step=0) is None
    log.add("eval", 5, split="test", accuracy=0.75)
    log.add("train", 6, loss=0.5)
    log.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("eval/test_accuracy")] == [(5, 0.75)]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(6, 0.5)]


def test_without_tensorboard_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    log = MetricLog(tmp_path / "metrics.jsonl")
    assert "pip install tensorboard" in log.open_tensorboard(tmp_path / "tensorboard", step=0)
    log.add("train", 1, loss=2.0)
    log.close()


def test_tensorboard_that_cannot_write_does_not_stop_a_run(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").touch()
    log = MetricLog(tmp_path / "metrics.jsonl")
    assert "could not write" in log.open_tensorboard(tmp_path / "file" / "tensorboard", step=0)
