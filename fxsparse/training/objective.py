"""What a forward pass comes to, and which number of it the tables show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """The region for a forward pass; `amp` is "none", "bf16" or "fp16"."""
    return nullcontext() if amp == "none" else torch.autocast(device.type, _AMP_DTYPES[amp])


@dataclass(frozen=True)
class Metric:
    """The number by which runs are compared.

    Attributes:
        name: as tables and pictures head it, and `Result.metric`.
        key: as records keep it.
        short: as the progress bar shows it.
        higher_is_better: or lower.
        of: from the loss (mean cross-entropy in nats) and the accuracy.
    """

    name: str
    key: str
    short: str
    higher_is_better: bool
    of: Callable[[float, float], float]

    def figures(self, loss: float, accuracy: float) -> dict[str, float]:
        """What a record holds."""
        return {"loss": loss, "accuracy": accuracy, self.key: self.of(loss, accuracy)}

    def best(self, records: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The best of some records, the first of equals."""
        return (max if self.higher_is_better else min)(records, key=lambda record: record[self.key])


ACCURACY = Metric("accuracy", "accuracy", "acc", True, lambda loss, accuracy: accuracy)
BITS_PER_CHARACTER = Metric(
    "bits per character", "bits_per_character", "bpc", False, lambda loss, accuracy: loss / math.log(2)
)
METRICS = {metric.name: metric for metric in (ACCURACY, BITS_PER_CHARACTER)}


@dataclass(frozen=True)
class Outcome:
    """What a forward pass came to: `loss` is the mean over its `count` predictions, of which `correct` are
    right; both tensors are 0-dimensional and on the device."""

    loss: Tensor
    correct: Tensor
    count: int
