"""Comparisons of tiny runs, and results made by hand."""

import json

import pytest

from fxsparse.studies.comparison import parse_comparison
from fxsparse.studies.plan import make_plan
from fxsparse.training import Result

TINY = {
    "data": "digits",
    "model": "small_resnet",
    "model_options": {"width": 2},
    "steps": 12,
    "batch_size": 16,
    "update_interval": 4,
    "log_interval": 1,
    "checkpoint_interval": 3,
    "threads": 1,
}


def hand_made(run, accuracy, training_flops, **more):
    """A finished run's result, with an accuracy and costs that a test made up."""
    density = 1.0 if run.sparsity is None else 1 - run.sparsity
    values = {
        "run_folder": str(run.folder),
        "model": run.config.model,
        "data": run.config.data,
        "method": run.config.method,
        "seed": run.seed,
        "steps": run.config.steps,
        "test_accuracy": accuracy,
        "test_loss": 1.0,
        "best_accuracy": accuracy,
        "best_step": 1,
        "watched_split": "test",
        "sparsity": 1 - density,
        "inference_flops": density,
        "training_flops": training_flops,
        "macs": 1000,
        "dense_macs": 10_000,
        "active_weights": 100,
        "rewirings": 0,
        "skipped_rewirings": 0,
        "changed_per_rewiring": 0.0,
        "seconds": 1.0,
        "device": "cpu",
        "versions": {"torch": "9.9"},
    }
    return Result(**values | more)


@pytest.fixture
def put_result():
    """Fills a run's folder as if it had been trained: `put_result(run, accuracy, training_flops, **fields)`."""

    def put(run, accuracy, training_flops, **more):
        run.folder.mkdir(parents=True)
        (run.folder / "config.json").write_text(run.config.to_json())
        (run.folder / "result.json").write_text(hand_made(run, accuracy, training_flops, **more).to_json())

    return put


@pytest.fixture
def planned(tmp_path):
    """From the values of a YAML file to the comparison and its runs, below a temporary folder."""

    def plan(**values):
        values.setdefault("options", TINY)
        comparison = parse_comparison(json.loads(json.dumps(values)), "test.yaml")
        return comparison, make_plan(comparison, tmp_path / "out")

    return plan
