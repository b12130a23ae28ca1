"""A queue of tiny runs on digits, at places of the real tables, and results made by hand."""

import dataclasses
import json
from pathlib import Path

import pytest
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxsparse.reproduction.published import place
from fxsparse.reproduction.queue import QueuedRun
from fxsparse.reproduction.slices import Workplace
from fxsparse.training import TrainConfig

TINY = {
    "data": "digits",
    "model": "small_resnet",
    "model_options": {"width": 2},
    "steps": 10,
    "batch_size": 16,
    "update_interval": 3,
    "log_interval": 1,
    "checkpoint_interval": 4,
    "eval_interval": 5,
    "threads": 1,
    "tensorboard": False,
    "plots": False,
    "verify": False,
}


@pytest.fixture
def tiny():
    """A queued run of ten steps: `tiny("RigL", "erk", 0.1, seed=0, **options)`."""
    return _tiny


def _tiny(label="static", distribution="erk", density=0.1, seed=0, **options):
    where = place(label, distribution, density)
    values = {**TINY, "sparsity": round(1 - density, 10), **where.row.options, **options, "seed": seed}
    return QueuedRun(f"tiny-{label.lower()}-seed{seed}", where, seed, TrainConfig(**values).resolved())


@pytest.fixture
def somewhere(tmp_path):
    """A workplace below a temporary folder; `somewhere("b")` is another."""

    def make(name="a"):
        return Workplace(tmp_path / name / "runs", tmp_path / name / "results")

    return make


@pytest.fixture
def steps_made():
    """How many optimizer steps the test has made, and what is called after each."""

    class Steps:
        count = 0
        then = staticmethod(lambda count: None)

    def after_step(*arguments):
        Steps.count += 1
        Steps.then(Steps.count)

    handle = register_optimizer_step_post_hook(after_step)
    yield Steps
    handle.remove()


@pytest.fixture
def put_result():
    """Leaves a result file as a run does, with figures that a test made up; with `reason`, of one that diverged."""
    return _put_result


def _put_result(folder: Path, run: QueuedRun, accuracy=None, *, device="cpu, 1 threads", seconds_a_step=0.5, **more):
    density = run.place.density
    result = {
        "model": run.config.model,
        "data": run.config.data,
        "method": run.config.method,
        "seed": run.seed,
        "steps": run.steps,
        "test_accuracy": accuracy,
        "test_loss": 1.0,
        "best_accuracy": accuracy,
        "best_loss": 1.0,
        "best_step": 1,
        "watched_split": "test",
        "sparsity": 1 - density,
        "inference_flops": 2 * density,
        "training_flops": 3 * density,
        "macs": 1,
        "dense_macs": 10,
        "active_weights": 100,
        "rewirings": 0,
        "skipped_rewirings": 0,
        "changed_per_rewiring": 0.0,
        "seconds": seconds_a_step * run.steps,
        "device": device,
        "versions": {"torch": "9.9"},
    }
    content = {
        "kind": "reproduction run",
        "format": 1,
        "name": run.name,
        "state": "finished",
        "method": run.place.row.label,
        "density": density,
        "seed": run.seed,
        "at_a_time": 1,
        "result": result,
        "curve": [[1, 1.0, 0.5]],
        "config": dataclasses.asdict(run.config),
    }
    if "reason" in more:
        del content["result"]
        content |= {"state": "diverged", "stopped_at": 7}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run.name}.json"
    path.write_text(json.dumps(content | more))
    return path
