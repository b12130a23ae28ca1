"""From a configuration to everything that a run is made of: data, sparse network, optimizer, rewirer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import fxsparse
import fxsparse.models as models
from fxsparse.core.errors import ConfigError
from fxsparse.flops import FlopReport
from fxsparse.runtime.methods import METHODS
from fxsparse.training import data, random_state
from fxsparse.training.classification import Classification
from fxsparse.training.config import TrainConfig
from fxsparse.training.earlier_run import Inheritance, inherit, inherit_again, load_weights
from fxsparse.training.execution import compile_network, make_optimizer
from fxsparse.training.next_character import NextCharacter
from fxsparse.training.objective import Outcome
from fxsparse.training.schedule import learning_rate
from fxsparse.training.small_dense import matching_width
from fxsparse.training.task import Task, TrainingBatches

GOAL_OPTIONS = ("sparsity", "flops", "distribution", "include", "exclude", "dense")
SPARSIFY_OPTIONS = (
    "method",
    "granularity",
    "pack_masks",
    "sparsity",
    "flops",
    "distribution",
    "drop_fraction",
    "update_interval",
    "stop_fraction",
    "decay",
    "decay_power",
    "redistribution",
    "include",
    "exclude",
    "dense",
    "seed",
    "verify",
)


@dataclass(frozen=True)
class FullSize:
    """What a narrower network is compared with: the one of full width, dense.

    Attributes:
        flops: of a forward pass of the example.
        weights: elements of all weights that would have a mask.
        width: the narrower network's; None where channels were removed from the full one.
    """

    flops: FlopReport
    weights: int
    width: float | None


@dataclass
class Experiment:
    """The parts of a run, built from `config`; lengths are in optimizer steps."""

    config: TrainConfig
    device: torch.device
    task: Task
    total_steps: int
    sparse: Any  # the SparseModule
    network: Callable[..., Any]  # what is called to train: `sparse`, or `sparse` compiled
    optimizer: torch.optim.Optimizer
    rewirer: Any
    scaler: torch.amp.GradScaler
    inheritance: Inheritance
    full: FullSize | None = None

    @property
    def train_batches(self) -> TrainingBatches:
        return self.task.train_batches

    @property
    def eval_interval(self) -> int:
        return self.config.eval_interval or max(len(self.train_batches), self.total_steps // 50)

    @property
    def checkpoint_interval(self) -> int:
        return self.config.checkpoint_interval or self.eval_interval

    def may_lower(self, step: int) -> bool:
        """Whether weights are to be lowered before optimizer step `step`.

        A method that starts dense is lowered when it has pruned for the last time.
        """
        if not self.config.lower or self.sparse.is_lowered:
            return False
        if not self.sparse.method.starts_dense:
            return True
        made = self.rewirer.step_count  # fewer than `step` where the scaler skipped some
        later = any(self.rewirer.schedule.is_update_step(t) for t in range(made, self.total_steps))
        return not later and bool(self.rewirer.update_count)

    @property
    def watched_split(self) -> str:
        """The split that is evaluated during the run: the validation part where one is held out."""
        return "validation" if self.task.has_validation else "test"

    def rate_at(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        config = self.config
        assert config.lr is not None and config.schedule is not None
        return learning_rate(
            step,
            self.total_steps,
            base=config.lr,
            schedule=config.schedule,
            milestones=tuple(each if each < 1 else each * config.extend for each in config.milestones),
            gamma=config.gamma,
            warmup_steps=round(config.warmup_steps * config.extend),
        )

    def evaluate(self, split: str) -> tuple[float, float]:
        """`(loss, accuracy)` on "validation" or "test"."""
        compiled = self.network if self.config.compile != "none" else None
        return self.task.evaluate(self.sparse, split, compiled)

    def train_step(self, inputs: Tensor, targets: Tensor, step: int) -> Outcome:
        """Optimizer step `step`, counted from 0, on one batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate_at(step)
        outcome = self.task.outcome(self.network, inputs, targets)
        self.scaler.scale(outcome.loss).backward()
        if self.config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.sparse.parameters(), self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return outcome


def build(config: TrainConfig, saved: Mapping[str, Any] | None = None) -> Experiment:
    """Load the data, build and sparsify the network, make the optimizer and attach the rewirer.

    `saved` is the checkpoint that the run goes on from, whose state is still to be loaded.
    Seeds the global random generators with `config.seed`. Raises an `FxSparseError` for whatever the
    configuration asks for that cannot be had.
    """
    config = config.resolved()
    device = choose_device(config.device)
    if config.lower and device.type != "cpu":
        raise ConfigError(f"lower is for the CPU, and the device is {device}; give --device cpu, or leave lower out")
    task = make_task(config, device)
    length = config.steps or config.epochs * len(task.train_batches)  # type: ignore[operator]
    total_steps = round(config.extend * length)
    beyond = [step for step in config.keep_steps or () if step > total_steps]
    if beyond:
        raise ConfigError(f"keep_steps: {beyond[0]} is beyond the {total_steps} steps of the run")
    inheritance = inherit_again(config, saved) if saved else inherit(config)

    random_state.seed_everything(config.seed)
    full = full_size(task, config) if config.method == "small-dense" else None
    random_state.seed_everything(config.seed)
    model = task.model(width=full.width) if full and full.width else task.model()
    narrowed = full is not None and full.width is not None
    sparse = sparsify(model, task.example(model), config, inheritance.goal, narrowed).to(device)
    if config.channels_last:
        sparse.to(memory_format=torch.channels_last)
    if inheritance.weights is not None:
        load_weights(sparse, inheritance.weights, str(config.weights_from or config.masks_from))
    sparse.train()
    optimizer = make_optimizer(sparse.parameters(), config, device)
    return Experiment(
        config=config,
        device=device,
        task=task,
        total_steps=total_steps,
        sparse=sparse,
        network=compile_network(sparse, config.compile),
        optimizer=optimizer,
        rewirer=sparse.attach(optimizer, total_steps=total_steps, compact=config.compact),
        scaler=torch.amp.GradScaler(device.type, enabled=config.amp == "fp16"),
        inheritance=inheritance,
        full=full,
    )


def make_task(config: TrainConfig, device: torch.device) -> Task:
    """What the data set of a resolved `config` asks to be learned, with the data read."""
    return (NextCharacter if data.is_text(config.data) else Classification)(config, device)


def sparsify(
    model: nn.Module,
    example: Any,
    config: TrainConfig,
    inherited: Mapping[str, Any] = MappingProxyType({}),
    narrowed: bool = False,
) -> Any:
    """`fxsparse.sparsify` with the options of `config`, which have its names.

    `inherited` are the arguments that come from an earlier run; `narrowed` says that the model was built as small as
    `small-dense` wants it.
    """
    if narrowed:
        return fxsparse.sparsify(model, example, "dense", seed=config.seed, verify=config.verify)
    options: dict[str, Any] = {name: getattr(config, name) for name in SPARSIFY_OPTIONS}
    options |= {"semantics": config.semantics_mapping, **_stretched(config)}
    if inherited:
        options |= {"sparsity": None, "flops": None, **inherited}
    return fxsparse.sparsify(model, example, **options)


def _stretched(config: TrainConfig) -> dict[str, Any]:
    """The method's options, those that are steps of the run stretched with it."""
    stretched = METHODS[config.method].step_options
    return {
        name: round(value * config.extend) if name in stretched and isinstance(value, int) and value >= 1 else value
        for name, value in config.method_options.items()
    }


def full_size(task: Task, config: TrainConfig) -> FullSize:
    """The task's network, and the width, if it has one, at which it has as many parameters as it would have sparse."""
    assert config.model is not None
    model = task.model()
    example = task.example(model)
    width = None
    if models.has_width(config.model):
        goal = {name: getattr(config, name) for name in GOAL_OPTIONS}
        base = config.model_options.get("width", models.default_width(config.model))
        sparse = fxsparse.sparsify(model, example, "static", verify=False, **goal)
        width = matching_width(lambda width: task.model(width=width), base, sparse.target_parameters)
    dense = fxsparse.sparsify(model, example, "dense", verify=False)
    return FullSize(fxsparse.count_flops(model, example), sum(site.numel for site in dense.sites), width)


def choose_device(name: str) -> torch.device:
    """The device called `name`, "auto" the accelerator if there is one; `ConfigError` if it is not there."""
    present = ["cpu"]
    if torch.backends.mps.is_available():
        present.insert(0, "mps")
    if torch.cuda.is_available():
        present[:0] = ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name == "auto":
        name = present[0]
    if name not in present:
        raise ConfigError(f"there is no device {name!r} here; choices: auto, {', '.join(present)}")
    return torch.device(name)
