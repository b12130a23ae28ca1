"""What a step minimises and what an evaluation measures: classification."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AUXILIARY_WEIGHT = 0.3  # of each auxiliary head (Szegedy et al., "Going deeper with convolutions", section 5)
_AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """The region for a forward pass; `amp` is "none", "bf16" or "fp16"."""
    return nullcontext() if amp == "none" else torch.autocast(device.type, _AMP_DTYPES[amp])


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


@torch.no_grad()
def evaluate(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, amp: str = "none") -> tuple[float, float]:
    """`(loss, accuracy)` of `network` in eval mode, means over all images; its mode is put back."""
    was_training = network.training
    network.eval()
    loss_sum, correct, count = [], [], 0
    for images, labels in batches:
        with autocast(images.device, amp):
            loss, logits = loss_and_logits(network(images), labels)
        loss_sum.append(loss * len(labels))
        correct.append(correct_count(logits, labels))
        count += len(labels)
    network.train(was_training)
    return float(torch.stack(loss_sum).sum()) / count, int(torch.stack(correct).sum()) / count
