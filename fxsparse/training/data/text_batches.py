"""Sequences of a text: shuffled ones to train on, and all of it in order to evaluate.

In both a sequence of T characters comes with the T characters that follow each of them, its targets.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from fxsparse.core.errors import ConfigError
from fxsparse.training.data.placement import send
from fxsparse.training.data.seeds import stream

IGNORED = -100  # the target of a place that is no character; what `F.cross_entropy` leaves out
MOST_ROWS = 64  # of an evaluation
LEAST_SEQUENCES = 16  # in each of them, where there are several


class TextBatches:
    """Epochs over a text (uint8, (characters,)) in sequences of `sequence_length` that do not overlap.

    An epoch begins at a random offset below `sequence_length`, so that sequences are cut elsewhere in every
    epoch, and takes them in random order; what is left over at both ends, less than two sequences, and an
    incomplete last batch are left out. Offset and order of epoch e come from the random stream (seed, e): a
    batch is a pure function of (seed, epoch, batch).

    Raises ConfigError for a text that is too short for one batch.
    """

    def __init__(
        self,
        text: Tensor,
        batch_size: int,
        sequence_length: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.batch_size, self.sequence_length, self.seed = batch_size, sequence_length, seed
        self._characters = len(text)
        self._text = text.to(device)
        if not len(self):
            raise ConfigError(
                f"the training part has {len(text)} characters; batch_size {batch_size} and sequence_length "
                f"{sequence_length} need {(batch_size + 1) * sequence_length}"
            )

    @property
    def sequences(self) -> int:
        """Sequences per epoch, as many as there are at every offset."""
        return self._characters // self.sequence_length - 1

    def __len__(self) -> int:
        """Batches per epoch."""
        return max(0, self.sequences) // self.batch_size

    def epoch(self, index: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `start`, `start + 1`, ... of epoch `index`: int64 characters and targets, each
        (batch, sequence), on the device; the same whatever `start` is."""
        if not 0 <= start <= len(self):
            raise ConfigError(f"start {start} is not in 0..{len(self)}, the batches of one epoch")
        generator = stream("text", self.seed, index)
        offset = int(torch.randint(self.sequence_length, (), generator=generator))
        order = torch.randperm(self.sequences, generator=generator)
        within = torch.arange(self.sequence_length + 1)
        for numbers in order.split(self.batch_size)[start : len(self)]:
            places = offset + numbers[:, None] * self.sequence_length + within
            drawn = self._text[send(places, self._text.device)].long()
            yield drawn[:, :-1], drawn[:, 1:]


def in_order(text: Tensor, sequence_length: int, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
    """All of `text` (uint8, (characters,)), every character but the first a target exactly once.

    The text is laid out in rows (see `row_count`), each the continuation of the one before; batch i holds the
    i-th sequence of every row, so that a network's state can be carried from one batch to the next. Characters
    and targets are int64 (rows, sequence_length) on `device`; what is left of the last row, and of every row's last
    sequence, is filled up with character 0 and target `IGNORED`.
    """
    predictions = len(text) - 1
    rows = row_count(predictions, sequence_length)
    length = -(-predictions // rows)
    missing, unfilled = rows * length - predictions, -length % sequence_length
    columns = [
        F.pad(F.pad(part.long(), (0, missing), value=filler).view(rows, length), (0, unfilled), value=filler)
        for part, filler in ((text[:-1], 0), (text[1:], IGNORED))
    ]
    for characters, targets in zip(*(each.split(sequence_length, dim=1) for each in columns), strict=True):
        yield send(characters, torch.device(device)), send(targets, torch.device(device))


def row_count(predictions: int, sequence_length: int) -> int:
    """Rows for `predictions` targets: at most 64, of 16 sequences or more each, and at least one."""
    return min(MOST_ROWS, max(1, predictions // (LEAST_SEQUENCES * sequence_length)))
