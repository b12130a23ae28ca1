"""Image sets: cross-entropy over classes, auxiliary heads weighted in; accuracy in the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsparse.models as models
from fxsparse.training import data
from fxsparse.training.config import TrainConfig
from fxsparse.training.objective import ACCURACY, Outcome, autocast
from fxsparse.training.task import Task

AUXILIARY_WEIGHT = 0.3  # of each auxiliary head (Szegedy et al., "Going deeper with convolutions", section 5)


class Classification(Task):
    """Which class an image is of. Reads the images when made: raises ConfigError or DataError."""

    metric = ACCURACY

    def __init__(self, config: TrainConfig, device: torch.device):
        assert config.batch_size and config.flip is not None and config.crop is not None
        self.config, self.device = config, device
        self.splits = data.load(
            config.data,
            config.data_root,
            validation=config.validation,
            train_images=config.train_images,
            image_size=config.image_size,
            split_seed=config.split_seed,
        )
        parts = [self.splits.train, self.splits.test, self.splits.validation]
        placement = data.place([part for part in parts if part], device, config.data_device, config.workers)
        self.data_device, self.place = placement.device, placement.words
        self.train_batches = data.Batches(
            self.splits.train,
            config.batch_size,
            mean=self.splits.mean,
            std=self.splits.std,
            flip=config.flip,
            crop=config.crop,
            seed=config.seed,
            device=device,
            data_device=self.data_device,
            channels_last=config.channels_last,
            workers=config.workers,
        )
        self.has_validation = self.splits.validation is not None
        self.size = f"{len(self.splits.train)} images"
        self.batch = f"{config.batch_size} images"

    def model(self, **changes: Any) -> nn.Module:
        assert self.config.model is not None
        return models.build(
            self.config.model,
            num_classes=self.splits.num_classes,
            in_channels=self.splits.channels,
            **{**self.config.model_options, **changes},
        )

    def example(self, model: nn.Module) -> tuple[Tensor, ...]:
        """Two images."""
        assert self.config.model is not None
        splits = self.splits
        return (models.example_input(self.config.model, size=splits.image_size, in_channels=splits.channels),)

    def outcome(self, network: Callable[..., Any], inputs: Tensor, targets: Tensor) -> Outcome:
        return self._outcome(network, inputs, targets, self.config.label_smoothing)

    def outcomes(self, network: Callable[..., Any], split: str) -> Iterator[Outcome]:
        """All images of the split, in order and unaugmented."""
        for images, labels in self._evaluation_batches(split).epoch(0):
            yield self._outcome(network, images, labels, 0.0)

    def _outcome(self, network: Callable[..., Any], images: Tensor, labels: Tensor, label_smoothing: float) -> Outcome:
        with autocast(self.device, self.config.amp):
            loss, logits = loss_and_logits(network(images), labels, label_smoothing)
        return Outcome(loss, correct_count(logits, labels), len(labels))

    def _evaluation_batches(self, split: str) -> data.Batches:
        images = getattr(self.splits, split)
        return data.Batches(
            images,
            min(self.config.eval_batch_size, len(images)),
            mean=self.splits.mean,
            std=self.splits.std,
            shuffle=False,
            drop_last=False,
            device=self.device,
            data_device=self.data_device,
            channels_last=self.config.channels_last,
            workers=self.config.workers,
        )


def heads(output: Any) -> list[Tensor]:
    """The logits (N, classes) of a network's output, the main head first: a tensor, a tuple or a dict."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [value for value in values if isinstance(value, Tensor)]


def loss_and_logits(output: Any, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy over the batch, auxiliary heads weighted in, and the main logits."""
    logits, *auxiliary = heads(output)
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    for extra in auxiliary:
        loss = loss + AUXILIARY_WEIGHT * F.cross_entropy(extra, labels, label_smoothing=label_smoothing)
    return loss, logits


def correct_count(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of the batch are classified right, as a 0-dimensional tensor on the device."""
    return (logits.argmax(1) == labels).sum()
