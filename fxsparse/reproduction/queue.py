"""The runs behind the tables, in an order that makes every prefix of it useful.

First one seed of dense, static, SET and RigL with ERK at density 0.1; then the uniform ones, the other density,
the other methods, Table 1 with all 50,000 images; then the second and the third seed of it all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxsparse.core.errors import ConfigError
from fxsparse.reproduction.published import HELD_OUT, METHODS, Place, all_places, place
from fxsparse.studies.comparison import QUIET, Row
from fxsparse.studies.plan import PlannedRun
from fxsparse.training.config import TrainConfig

SEEDS = (0, 1, 2)
STEPS = {50_000: 97_656, 45_000: 87_890}  # 250 epochs of batch 128; what is left of the last one is not made
FULL, SCALED = "full", "scaled"


@dataclass(frozen=True)
class Recipe:
    """What the report leaves open; the defaults are those of its code, from which its figures came.

    Attributes:
        nesterov: Nesterov momentum, of which the report's text says nothing.
        dropout: inside the blocks, likewise.
        stop_step: after it masks stay (t_end), of a run that is not extended: 75,000 in the report; its code has
            65,918 for the split of 45,000 images.
        semantics: a preset of `fxsparse.Semantics`.
    """

    nesterov: bool = True
    dropout: float = 0.3
    stop_step: int = 75_000
    semantics: str = "paper"

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}; it must be in [0, 1)")
        if not 0 < self.stop_step <= min(STEPS.values()):
            raise ConfigError(f"stop_step is {self.stop_step}; it must be 1 to {min(STEPS.values())}")

    @property
    def slug(self) -> str:
        """What differs from the defaults, as part of a run's name; empty for the defaults."""
        default = Recipe()
        parts = [
            "no-nesterov" if self.nesterov != default.nesterov else "",
            f"dropout{self.dropout:g}" if self.dropout != default.dropout else "",
            f"stop{self.stop_step}" if self.stop_step != default.stop_step else "",
            f"semantics-{self.semantics}" if self.semantics != default.semantics else "",
        ]
        return "-".join(part for part in parts if part)


@dataclass(frozen=True)
class QueuedRun:
    """One seed of one row at one density.

    Attributes:
        name: of its result and its state file.
        place: where it stands in the tables.
        config: resolved; training is a function of it.
    """

    name: str
    place: Place
    seed: int
    config: TrainConfig

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        assert self.config.steps is not None
        return round(self.config.steps * self.config.extend)

    def planned(self, out: Path) -> PlannedRun:
        """As a plan's run, in its folder below `out`."""
        row = Row(self.place.row.label, self.config.method)
        sparsity = None if self.place.density == 1 else round(1 - self.place.density, 10)
        return PlannedRun(row, sparsity, self.place.row.distribution, self.seed, self.config, out / self.name)


def full_queue(recipe: Recipe | None = None) -> list[QueuedRun]:
    """The full-size runs."""
    return [_full(each, seed, recipe or Recipe()) for seed in SEEDS for each in ordered_places()]


def ordered_places() -> list[Place]:
    """The accuracies of the tables in the order in which a seed of them is run."""
    compared = ("static", "SET", "RigL")
    order = [place("dense", None, 1.0), *(place(label, "erk", 0.1) for label in compared)]
    order += [place(label, "uniform", 0.1) for label in compared]
    order += [place(label, distribution, 0.2) for distribution in ("erk", "uniform") for label in compared]
    order += sorted((each for each in all_places() if each.row.images == 45_000), key=lambda each: each.density)
    order += sorted(all_places(), key=lambda each: each.density % 1)  # dense before 0.1, 0.2, 0.5
    return list({id(each): each for each in order}.values())


def _full(where: Place, seed: int, recipe: Recipe) -> QueuedRun:
    row = where.row
    steps = STEPS[row.images]
    values: dict[str, Any] = {
        "data": "cifar10",
        "model": "wide_resnet22_2",
        "model_options": {"dropout": recipe.dropout},
        "validation": HELD_OUT if row.images == 45_000 else 0,
        "steps": steps,
        "batch_size": 128,
        "optimizer": "sgd",
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": recipe.nesterov,
        "weight_decay": 5e-4,
        "schedule": "step",
        "milestones": (30_000.0, 60_000.0, 90_000.0),
        "gamma": 0.2,
        "flip": True,
        "crop": 4,
        "sparsity": round(1 - where.density, 10),
        "update_interval": 100,
        "drop_fraction": 0.3,
        "decay": "cosine",
        "stop_fraction": recipe.stop_step / steps,
        "semantics": recipe.semantics,
    }
    return _queued(f"{row.images // 1000}k", where, seed, values, recipe.slug)


SCALED_PLACES = (("dense", None, 1.0), ("static", "erk", 0.1), ("SET", "erk", 0.1), ("RigL", "erk", 0.1))


def scaled_queue() -> list[QueuedRun]:
    """The small version that a CPU finishes in half an hour: it proves the harness and says nothing of the tables.

    A quarter of the width, 8,000 training images, 2,000 steps of 64, no dropout, one thread.
    """
    values: dict[str, Any] = {
        "data": "cifar10",
        "model": "wide_resnet22_2",
        "model_options": {"width": 0.25},
        "train_images": 8_000,
        "steps": 2_000,
        "batch_size": 64,
        "nesterov": True,
        "update_interval": 50,
        "eval_interval": 400,
        "checkpoint_interval": 100,
        "threads": 1,
        "device": "cpu",
    }
    runs = []
    for seed in SEEDS:
        for label, distribution, density in SCALED_PLACES:
            where = place(label, distribution, density)
            own = values | {"sparsity": round(1 - density, 10)}
            runs.append(_queued("scaled", where, seed, own, ""))
    return runs


def _queued(prefix: str, where: Place, seed: int, values: Mapping[str, Any], suffix: str) -> QueuedRun:
    row = where.row
    config = TrainConfig(**{**QUIET, **values, **row.options, "seed": seed}).resolved()
    density = "" if where.density == 1 else f"{where.density:g}"
    parts = [prefix, row.label.lower().replace(" ", "-"), row.distribution or "", density, f"seed{seed}", suffix]
    return QueuedRun("-".join(part for part in parts if part), where, seed, config)


def with_options(runs: Sequence[QueuedRun], options: Mapping[str, Any]) -> list[QueuedRun]:
    """The runs with options that the result does not depend on; `ConfigError` for one that it does."""
    return [dataclasses.replace(run, config=run.config.changed_by(dict(options))) for run in runs]


TIMED_AS = {"RigL 2x": "RigL"}
"""Methods whose steps are those of another: a run twice as long has the same."""
METHODS_TIMED = tuple(label for label in METHODS if label not in TIMED_AS)
