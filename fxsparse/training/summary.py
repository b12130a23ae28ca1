"""What a run says of itself: a few lines before it, a table and `result.json` after it."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate

from fxsparse.flops import FlopReport, TrainingCost, planned_cost, realised_cost
from fxsparse.training.experiment import Experiment
from fxsparse.training.metrics import MetricLog
from fxsparse.training.objective import METRICS


@dataclass(frozen=True)
class Result:
    """How a finished run came out.

    Accuracies (of images, or of next characters) and fractions are in [0, 1]; losses are mean cross-entropies in
    nats. `metric` names what the tables show, `score` is its value on the test part. `inference_flops` and
    `training_flops` are ratios to the dense network of full width and to its training for a run that is not extended
    (realised by the steps that were made, and by the runs that masks, densities or weights were taken from;
    `training_flops_total` without the ratio); `macs` are multiply-accumulates of one example, an image or a
    sequence of characters; `changed_per_rewiring` is the mean number of connections that a rewiring grew;
    Where whole channels are dropped and grown, what is changed and was ever active are channels, of which
    `active_channels` are left. `ever_active` is the share of all masked weights that were active at any time,
    `skipped_steps` are those of `steps` that a GradScaler left out, `dead_units` the number of output units without
    an active weight; `width` is a narrowed network's.
    """

    run_folder: str
    model: str
    data: str
    method: str
    seed: int
    steps: int
    test_accuracy: float
    test_loss: float
    best_accuracy: float  # on the split that was watched during the run, at the step that is best by the metric
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
    metric: str = "accuracy"  # a name of `METRICS`
    best_loss: float = math.nan  # of the same evaluation as `best_accuracy`
    ever_active: float = math.nan
    dead_units: int = 0
    active_channels: int = 0
    width: float | None = None
    earlier: dict[str, float] = field(default_factory=dict)  # folder -> FLOPs of training, of the runs before it
    skipped_steps: int = 0

    @property
    def score(self) -> float:
        """The metric on the test part: an accuracy, or bits per character."""
        return METRICS[self.metric].of(self.test_loss, self.test_accuracy)

    @property
    def best_score(self) -> float:
        """The metric on the watched split at `best_step`, where it was best."""
        return METRICS[self.metric].of(self.best_loss, self.best_accuracy)

    @property
    def higher_is_better(self) -> bool:
        """Whether the better of two runs has the higher `score`."""
        return METRICS[self.metric].higher_is_better

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
    """The result of a run whose last record is its evaluation on the test part."""
    sparse, config = experiment.sparse, experiment.config
    tested = log.last("eval", split="test")
    assert tested is not None
    watched = [r for r in log.records if r["kind"] == "eval" and r["split"] == experiment.watched_split]
    best = experiment.task.metric.best(watched)
    flops, ledger = sparse.flops(), Ledger.of(experiment)
    rewirings = [record for record in log.records if record["kind"] == "rewire"]
    done = [sum(record["changed"].values()) for record in rewirings if not record["skipped"]]
    training = realised_cost(sparse, experiment.rewirer)
    telemetry = experiment.rewirer.telemetry()
    active = sum(int(mask.sum()) for mask in sparse.masks.values())
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
        best_loss=best["loss"],
        best_step=best["step"],
        watched_split=experiment.watched_split,
        sparsity=1.0 - active / ledger.weights,
        inference_flops=ledger.inference(flops),
        training_flops=ledger.training(training),
        macs=flops.macs // ledger.examples,
        dense_macs=ledger.dense_macs // ledger.examples,
        active_weights=active,
        rewirings=len(rewirings),
        skipped_rewirings=len(rewirings) - len(done),
        changed_per_rewiring=sum(done) / len(done) if done else 0.0,
        seconds=round(seconds, 2),
        device=device_name(experiment.device),
        versions=versions(),
        densities=dict(sparse.densities),
        training_flops_total=ledger.total(training),
        ever_active=sum(row.explored * row.size for row in telemetry)
        / (sum(row.size for row in telemetry) if sparse.channel_sites else ledger.weights),
        active_channels=sum(row.active for row in telemetry) if sparse.channel_sites else 0,
        dead_units=sum(row.dead_outputs for row in telemetry),
        width=experiment.full.width if experiment.full else None,
        earlier=experiment.inheritance.cost,
        skipped_steps=experiment.total_steps - experiment.rewirer.step_count if experiment.scaler.is_enabled() else 0,
        metric=experiment.task.metric.name,
    )


@dataclass(frozen=True)
class Ledger:
    """A run's costs over those of the plain dense one: full width, not extended.

    Attributes:
        examples: images or sequences in the example that the network was captured with; FLOP counts are of all of them.
        dense_macs: of a forward pass of the example through the dense network of full width.
        weights: elements of all weights that have, or at full width would have, a mask.
        steps: optimizer steps of the run if it were not extended.
        batch: examples a step.
        earlier: FLOPs of training the runs that masks, densities or weights were taken from.
    """

    examples: int
    dense_macs: int
    weights: int
    steps: float
    batch: int
    earlier: float

    @classmethod
    def of(cls, experiment: Experiment) -> Ledger:
        sparse, config, full = experiment.sparse, experiment.config, experiment.full
        return cls(
            examples=sparse.example[0][0].shape[0],
            dense_macs=full.flops.macs if full else sparse.flops().dense_macs,
            weights=full.weights if full else sum(mask.numel() for mask in sparse.masks.values()),
            steps=experiment.total_steps / config.extend,
            batch=config.batch_size or 1,
            earlier=sum(experiment.inheritance.cost.values()),
        )

    def inference(self, flops: FlopReport) -> float:
        """A forward pass over the dense one."""
        return flops.macs / self.dense_macs if self.dense_macs else 1.0

    def training(self, cost: TrainingCost) -> float:
        """A run, with those before it, over the dense one."""
        dense = 6 * self.dense_macs * self.steps / self.examples * self.batch
        return self.total(cost) / dense if dense else 1.0

    def total(self, cost: TrainingCost) -> float:
        """FLOPs of all examples of a run and of those before it."""
        return cost.flops / self.examples * self.batch + self.earlier


def before(experiment: Experiment) -> str:
    """What is about to be trained: size, achieved sparsity, FLOPs, length."""
    sparse, config, ledger = experiment.sparse, experiment.config, Ledger.of(experiment)
    goal = sparse.target_counts if sparse.method.starts_dense else sparse.active_counts
    kept = sum(goal.values())
    training = planned_cost(sparse, experiment.total_steps)
    flops = sparse.flops().at(goal)
    width = f", width {experiment.full.width:g}" if experiment.full and experiment.full.width else ""
    without = [f"  without a mask: {item.name} ({item.reason})" for item in sparse.uncovered]
    return "\n".join(
        [
            f"{config.model}{width} on {config.data} ({experiment.task.size}), {config.method}, {config.distribution}",
            f"  {len(sparse.masks)} masked tensors, {ledger.weights} weights: "
            f"sparsity {1 - kept / ledger.weights:.6f}, density {kept / ledger.weights:.6f}",
            f"  FLOPs x dense: inference {ledger.inference(flops):.4f}, training {ledger.training(training):.4f} "
            f"(planned: {ledger.total(training):.3e} FLOPs)",
            f"  {experiment.total_steps} steps of {experiment.task.batch} on {device_name(experiment.device)}",
            *([f"  {experiment.task.place}"] if experiment.task.place else []),
            *without,
        ]
    )


def after(result: Result) -> str:
    """The final table of one run."""
    kind = "channels" if result.active_channels else "weights"
    share = result.changed_per_rewiring / (result.active_channels or result.active_weights or 1)
    rows: list[tuple[str, Any]] = [
        (f"test {result.metric}", f"{result.score:.4f}"),
        (f"best on {result.watched_split}", f"{result.best_score:.4f} at step {result.best_step}"),
        ("density", f"{result.density:.6f}"),
        ("inference FLOPs x dense", f"{result.inference_flops:.4f}"),
        ("training FLOPs x dense", f"{result.training_flops:.4f} ({result.training_flops_total:.3e} FLOPs)"),
        ("rewirings", f"{result.rewirings} ({result.skipped_rewirings} skipped)"),
        *([("skipped steps", f"{result.skipped_steps} (fp16)")] if result.skipped_steps else []),
        (
            "mask changes a rewiring",
            f"{result.changed_per_rewiring:.1f} ({share:.2%} of the active {kind})",
        ),
        (f"{kind} ever active", f"{result.ever_active:.4f}"),
        ("dead units", f"{result.dead_units}"),
        ("seconds", f"{result.seconds:.1f}"),
    ]
    return tabulate(rows, tablefmt="simple", disable_numparse=True)


def comparison(results: Sequence[Result]) -> str:
    """One row a run."""
    headers = [
        "method",
        "test " + " or ".join(dict.fromkeys(result.metric for result in results)),
        "test loss",
        "density",
        "inference FLOPs x dense",
        "training FLOPs x dense",
        "seconds",
    ]
    rows = [
        [
            result.method,
            f"{result.score:.4f}",
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
