"""From a configuration to everything that a run is made of: data, sparse network, optimizer, rewirer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fxsparse
import fxsparse.models as models
from fxsparse.core.errors import ConfigError
from fxsparse.training import data, random_state
from fxsparse.training.config import TrainConfig
from fxsparse.training.schedule import learning_rate

EVALUATION_BATCH = 500  # images
SPARSIFY_OPTIONS = (
    "method",
    "sparsity",
    "flops",
    "distribution",
    "drop_fraction",
    "update_interval",
    "stop_fraction",
    "decay",
    "include",
    "exclude",
    "dense",
    "seed",
    "verify",
)


@dataclass
class Experiment:
    """The parts of a run, built from `config`; lengths are in optimizer steps."""

    config: TrainConfig
    device: torch.device
    splits: data.Splits
    train_batches: data.Batches
    total_steps: int
    sparse: Any  # the SparseModule
    network: Callable[[Any], Any]  # what is called to train: `sparse`, or `sparse` compiled
    optimizer: torch.optim.Optimizer
    rewirer: Any
    scaler: torch.amp.GradScaler

    @property
    def eval_interval(self) -> int:
        return self.config.eval_interval or max(len(self.train_batches), self.total_steps // 50)

    @property
    def checkpoint_interval(self) -> int:
        return self.config.checkpoint_interval or self.eval_interval

    @property
    def watched_split(self) -> str:
        """The split that is evaluated during the run: the validation images where some are held out."""
        return "validation" if self.splits.validation is not None else "test"

    def evaluation_batches(self, split: str) -> data.Batches:
        """All images of a split ("test" or "validation"), in order and unaugmented."""
        images = getattr(self.splits, split)
        return data.Batches(
            images,
            min(EVALUATION_BATCH, len(images)),
            mean=self.splits.mean,
            std=self.splits.std,
            shuffle=False,
            drop_last=False,
            device=self.device,
            workers=self.config.workers,
        )

    def rate_at(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        config = self.config
        assert config.lr is not None
        return learning_rate(
            step,
            self.total_steps,
            base=config.lr,
            schedule=config.schedule,
            milestones=config.milestones,
            gamma=config.gamma,
            warmup_steps=config.warmup_steps,
        )


def build(config: TrainConfig) -> Experiment:
    """Load the data, build and sparsify the network, make the optimizer and attach the rewirer.

    Seeds the global random generators with `config.seed`. Raises an `FxSparseError` for whatever the
    configuration asks for that cannot be had.
    """
    config = config.resolved()
    assert config.batch_size and config.flip is not None and config.crop is not None
    device = choose_device(config.device)
    splits = data.load(
        config.data,
        config.data_root,
        validation=config.validation,
        image_size=config.image_size,
        split_seed=config.split_seed,
    )
    batches = data.Batches(
        splits.train,
        config.batch_size,
        mean=splits.mean,
        std=splits.std,
        flip=config.flip,
        crop=config.crop,
        seed=config.seed,
        device=device,
        workers=config.workers,
    )
    total_steps = config.steps or config.epochs * len(batches)  # type: ignore[operator]

    random_state.seed_everything(config.seed)
    model = models.build(
        config.model, num_classes=splits.num_classes, in_channels=splits.channels, **config.model_options
    )
    example = models.example_input(config.model, size=splits.image_size, in_channels=splits.channels)
    sparse = sparsify(model, example, config).to(device)
    sparse.train()
    optimizer = make_optimizer(sparse.parameters(), config)
    return Experiment(
        config=config,
        device=device,
        splits=splits,
        train_batches=batches,
        total_steps=total_steps,
        sparse=sparse,
        network=torch.compile(sparse) if config.compile else sparse,
        optimizer=optimizer,
        rewirer=sparse.attach(optimizer, total_steps=total_steps),
        scaler=torch.amp.GradScaler(device.type, enabled=config.amp == "fp16"),
    )


def sparsify(model: nn.Module, example: Any, config: TrainConfig) -> Any:
    """`fxsparse.sparsify` with the options of `config`, which have its names."""
    options: dict[str, Any] = {name: getattr(config, name) for name in SPARSIFY_OPTIONS}
    return fxsparse.sparsify(model, example, **options)


def make_optimizer(parameters: Any, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer over all `parameters`, at the configuration's base learning rate."""
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=config.momentum, nesterov=config.nesterov, **common)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](parameters, **common)


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
