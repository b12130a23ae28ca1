"""What a run says of itself: a few lines before it, a table and `result.json` after it."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate

from fxsparse.flops import TrainingCost, planned_cost, realised_cost
from fxsparse.training.experiment import Experiment
from fxsparse.training.metrics import MetricLog


@dataclass(frozen=True)
class Result:
    """How a finished run came out.

    Accuracies and fractions are in [0, 1]; `inference_flops` and `training_flops` are ratios to the dense
    network (the latter realised by the steps that were made, `training_flops_total` without the ratio);
    `macs` are multiply-accumulates of one image;
    `changed_per_rewiring` is the mean number of connections that a rewiring grew.
    """

    run_folder: str
    model: str
    data: str
    method: str
    seed: int
    steps: int
    test_accuracy: float
    test_loss: float
    best_accuracy: float  # on the split that was watched during the run
    best_step: int
    watched_split: str
    sparsity: float
    inference_flops: float
    training_flops: float
    macs: int
    dense_macs: int
    active_weights: int
    rewirings: int
    skipped_rewirings: int
    changed_per_rewiring: float
    seconds: float
    device: str
    versions: dict[str, str] = field(default_factory=dict)
    densities: dict[str, float] = field(default_factory=dict)
    training_flops_total: float = 0.0

    @property
    def density(self) -> float:
        return 1 - self.sparsity

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Result:
        return cls(**json.loads(text))


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    import fxsparse

    return {
        "fxsparse": getattr(fxsparse, "__version__", "unknown"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def collect(experiment: Experiment, log: MetricLog, run_folder: str, seconds: float) -> Result:
    """The result of a run whose last record is its evaluation on the test images."""
    sparse, config = experiment.sparse, experiment.config
    tested = log.last("eval", split="test")
    assert tested is not None
    watched = [r for r in log.records if r["kind"] == "eval" and r["split"] == experiment.watched_split]
    best = max(watched, key=lambda record: record["accuracy"])  # the first of equals
    flops = sparse.flops()
    rewirings = [record for record in log.records if record["kind"] == "rewire"]
    done = [sum(record["changed"].values()) for record in rewirings if not record["skipped"]]
    training = realised_cost(sparse, experiment.rewirer)
    return Result(
        run_folder=run_folder,
        model=str(config.model),
        data=config.data,
        method=config.method,
        seed=config.seed,
        steps=experiment.total_steps,
        test_accuracy=tested["accuracy"],
        test_loss=tested["loss"],
        best_accuracy=best["accuracy"],
        best_step=best["step"],
        watched_split=experiment.watched_split,
        sparsity=sparse.sparsity,
        inference_flops=flops.ratio,
        training_flops=training.ratio,
        macs=flops.macs // _example_images(experiment),
        dense_macs=flops.dense_macs // _example_images(experiment),
        active_weights=sum(int(mask.sum()) for mask in sparse.masks.values()),
        rewirings=len(rewirings),
        skipped_rewirings=len(rewirings) - len(done),
        changed_per_rewiring=sum(done) / len(done) if done else 0.0,
        seconds=round(seconds, 2),
        device=device_name(experiment.device),
        versions=versions(),
        densities=dict(sparse.densities),
        training_flops_total=_of_run(experiment, training),
    )


def _example_images(experiment: Experiment) -> int:
    """Images in the example that the network was captured with; FLOP counts are of all of them."""
    return experiment.sparse.example[0][0].shape[0]


def _of_run(experiment: Experiment, cost: TrainingCost) -> float:
    """FLOPs of all images of a run."""
    return cost.flops / _example_images(experiment) * (experiment.config.batch_size or 1)


def before(experiment: Experiment) -> str:
    """What is about to be trained: size, achieved sparsity, FLOPs, length."""
    sparse, config = experiment.sparse, experiment.config
    weights = sum(mask.numel() for mask in sparse.masks.values())
    flops = sparse.flops()
    training = planned_cost(sparse, experiment.total_steps)
    without = [f"  without a mask: {item.name} ({item.reason})" for item in sparse.uncovered]
    images = len(experiment.splits.train)
    return "\n".join(
        [
            f"{config.model} on {config.data} ({images} images), {config.method}, {config.distribution}",
            f"  {len(sparse.masks)} masked tensors, {weights} weights: "
            f"sparsity {sparse.sparsity:.6f}, density {1 - sparse.sparsity:.6f}",
            f"  FLOPs x dense: inference {flops.ratio:.4f}, training {training.ratio:.4f} "
            f"(planned: {_of_run(experiment, training):.3e} FLOPs)",
            f"  {experiment.total_steps} steps of {config.batch_size} images on {device_name(experiment.device)}",
            *without,
        ]
    )


def after(result: Result) -> str:
    """The final table of one run."""
    share = result.changed_per_rewiring / (result.active_weights or 1)
    rows: list[tuple[str, Any]] = [
        ("test accuracy", f"{result.test_accuracy:.4f}"),
        (f"best on {result.watched_split}", f"{result.best_accuracy:.4f} at step {result.best_step}"),
        ("density", f"{result.density:.6f}"),
        ("inference FLOPs x dense", f"{result.inference_flops:.4f}"),
        ("training FLOPs x dense", f"{result.training_flops:.4f} ({result.training_flops_total:.3e} FLOPs)"),
        ("rewirings", f"{result.rewirings} ({result.skipped_rewirings} skipped)"),
        (
            "mask changes a rewiring",
            f"{result.changed_per_rewiring:.1f} ({share:.2%} of the active weights)",
        ),
        ("seconds", f"{result.seconds:.1f}"),
    ]
    return tabulate(rows, tablefmt="simple", disable_numparse=True)


def comparison(results: Sequence[Result]) -> str:
    """One row a run."""
    headers = [
        "method",
        "test accuracy",
        "test loss",
        "density",
        "inference FLOPs x dense",
        "training FLOPs x dense",
        "seconds",
    ]
    rows = [
        [
            result.method,
            f"{result.test_accuracy:.4f}",
            f"{result.test_loss:.4f}",
            f"{result.density:.4f}",
            f"{result.inference_flops:.4f}",
            f"{result.training_flops:.4f}",
            f"{result.seconds:.1f}",
        ]
        for result in results
    ]
    return tabulate(rows, headers, tablefmt="simple", disable_numparse=True)


def device_name(device: torch.device) -> str:
    """The device as a person knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
