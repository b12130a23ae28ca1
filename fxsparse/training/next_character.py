"""Texts: cross-entropy of the next character; bits per character in the tables (Evci et al. 2020, section 4.2).

A training sequence begins with an empty state. An evaluation carries the state along, from each sequence of a
row to the next (`data.text_batches.in_order`), so that a character is predicted from all of its row before it.
Both use sequences of one length, for which the captured graph is unrolled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsparse.models as models
from fxsparse.core.errors import ConfigError
from fxsparse.training import data
from fxsparse.training.config import TrainConfig
from fxsparse.training.data.text_batches import IGNORED
from fxsparse.training.objective import BITS_PER_CHARACTER, Outcome, autocast
from fxsparse.training.task import Task


class NextCharacter(Task):
    """Which character comes next. Reads the text when made: raises ConfigError or DataError.

    The network takes characters (B, T) int64 and a state (B, ...), empty when it is 0, and gives logits
    (B, T, 256) and the next state.
    """

    metric = BITS_PER_CHARACTER

    def __init__(self, config: TrainConfig, device: torch.device):
        assert config.batch_size and config.sequence_length and config.split is not None
        if config.data_device == "cpu" != device.type:
            raise ConfigError("data_device is cpu; a text is always on the training device: leave data_device out")
        self.config, self.device = config, device
        self.sequence_length = config.sequence_length
        self.splits = data.load_text(config.data, config.split)
        self.train_batches = data.TextBatches(
            self.splits.train, config.batch_size, config.sequence_length, seed=config.seed, device=device
        )
        self.has_validation = self.splits.validation is not None
        self.size = f"{len(self.splits.train)} characters"
        self.batch = f"{config.batch_size} sequences of {config.sequence_length} characters"
        self._state = torch.zeros(0)  # of one sequence, once there is a network

    def model(self, **changes: Any) -> nn.Module:
        assert self.config.model is not None
        options = {**self.config.model_options, **changes}
        return models.build(self.config.model, num_classes=data.VOCABULARY, **options)

    def example(self, model: nn.Module) -> tuple[Tensor, ...]:
        """Two sequences and their empty states."""
        assert self.config.model is not None
        characters = models.example_input(self.config.model, size=self.sequence_length)
        with torch.no_grad():
            state = torch.zeros_like(model(characters)[1])
        self._state = state[:1].to(self.device)
        return characters, state

    def outcome(self, network: Callable[..., Any], inputs: Tensor, targets: Tensor) -> Outcome:
        outcome, _ = self._outcome(
            network, inputs, targets, self._empty_state(inputs), targets.numel(), self.config.label_smoothing
        )
        return outcome

    def outcomes(self, network: Callable[..., Any], split: str) -> Iterator[Outcome]:
        """Every character of the split but its first."""
        state = None
        for characters, targets in data.in_order(getattr(self.splits, split), self.sequence_length, self.device):
            state = self._empty_state(characters) if state is None else state
            count = int((targets != IGNORED).sum())
            outcome, state = self._outcome(network, characters, targets, state, count, 0.0)
            state = state.clone()  # a compiled network's results do not outlive the next call
            yield outcome

    def _outcome(
        self,
        network: Callable[..., Any],
        characters: Tensor,
        targets: Tensor,
        state: Tensor,
        count: int,
        label_smoothing: float,
    ) -> tuple[Outcome, Tensor]:
        """`count` of the targets are not `IGNORED`; also the next state."""
        with autocast(self.device, self.config.amp):
            logits, state = network(characters, state)
            loss = F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, label_smoothing=label_smoothing
            )
        return Outcome(loss, (logits.argmax(2) == targets).sum(), count), state

    def _empty_state(self, characters: Tensor) -> Tensor:
        return self._state.new_zeros(len(characters), *self._state.shape[1:])
