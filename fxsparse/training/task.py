"""What differs between kinds of data: the network, its loss, how it is evaluated, what the tables show.

`classification` and `next_character` are the two there are; the loop, checkpoints and records know only this.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fxsparse.training.config import TrainConfig
from fxsparse.training.execution import by_first_size, gate_closed
from fxsparse.training.objective import Metric, Outcome


class TrainingBatches(Protocol):
    """Batches of inputs and targets that are a pure function of (seed, epoch, batch)."""

    def __len__(self) -> int: ...

    def epoch(self, index: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...


class Task(ABC):
    """What is learned from a kind of data; what else a run does is the same for all.

    Attributes:
        config: resolved; what the network is built from.
        metric: what the tables show.
        train_batches: what the steps are made on.
        has_validation: whether a part is held out, to be watched during the run.
        size, batch: how much there is to train on and in a step, in words.
        place: where it lies, in words; empty where that goes without saying.
    """

    config: TrainConfig
    metric: Metric
    train_batches: TrainingBatches
    has_validation: bool
    size: str
    batch: str
    place: str = ""

    @abstractmethod
    def model(self, **changes: Any) -> nn.Module:
        """The network, freshly initialised from the global random state; `changes` go over its options."""

    @abstractmethod
    def example(self, model: nn.Module) -> tuple[Tensor, ...]:
        """The arguments to capture it with, two of a batch."""

    @abstractmethod
    def outcome(self, network: Callable[..., Any], inputs: Tensor, targets: Tensor) -> Outcome:
        """One forward pass over a training batch."""

    @abstractmethod
    def outcomes(self, network: Callable[..., Any], split: str) -> Iterator[Outcome]:
        """Forward passes over all of a split, "validation" or "test", without label smoothing."""

    @torch.no_grad()
    def evaluate(
        self, network: nn.Module, split: str, compiled: Callable[..., Any] | None = None
    ) -> tuple[float, float]:
        """`(loss, accuracy)` of `network` in eval mode, means over all predictions; its mode is put back.

        Where the network is `compiled`, all batches go through that but one that is smaller than the first.
        """
        was_training = network.training
        network.eval()
        if compiled is None:
            done = list(self.outcomes(network, split))
        else:
            with gate_closed(network):
                done = list(self.outcomes(by_first_size(compiled, network), split))
        network.train(was_training)
        count = sum(each.count for each in done)
        loss = float(torch.stack([each.loss * each.count for each in done]).sum()) / count
        return loss, int(torch.stack([each.correct for each in done]).sum()) / count
