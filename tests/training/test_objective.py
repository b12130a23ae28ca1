"""The loss and the evaluation, on numbers worked out by hand."""

import math

import pytest
import torch
from torch import nn

from fxsparse.training.classification import loss_and_logits
from fxsparse.training.objective import ACCURACY, BITS_PER_CHARACTER, METRICS, Outcome
from fxsparse.training.task import Task

LOGITS = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])  # softmax: 3/4, 1/4; 1/2, 1/2
LABELS = torch.tensor([0, 1])
LOSS = (math.log(4 / 3) + math.log(2)) / 2


def test_cross_entropy_and_label_smoothing():
    loss, logits = loss_and_logits(LOGITS, LABELS)
    assert float(loss) == pytest.approx(LOSS) and logits is LOGITS
    smoothed, _ = loss_and_logits(LOGITS, LABELS, label_smoothing=0.2)
    assert float(smoothed) == pytest.approx(
        0.8 * LOSS + 0.2 * (math.log(4 / 3) / 2 + math.log(4) / 2 + math.log(2)) / 2
    )


@pytest.mark.parametrize("output", [(LOGITS, LOGITS), {"out": LOGITS, "aux": LOGITS}, (LOGITS, LOGITS, None)])
def test_an_auxiliary_head_counts_three_tenths(output):
    loss, logits = loss_and_logits(output, LABELS)
    assert float(loss) == pytest.approx(1.3 * LOSS) and logits is LOGITS


class Constant(nn.Module):
    """Class 1 for every image in eval mode; nonsense in train mode."""

    def forward(self, images):
        logits = torch.zeros(len(images), 2)
        logits[:, 1] = -5.0 if self.training else math.log(3.0)
        return logits


class TwoBatches(Task):
    """Three images of class 1, then one of class 0."""

    def model(self):
        raise NotImplementedError

    example = outcome = model

    def outcomes(self, network, split):
        for labels in (torch.tensor([1, 1, 1]), torch.tensor([0])):
            loss, logits = loss_and_logits(network(labels), labels)
            yield Outcome(loss, (logits.argmax(1) == labels).sum(), len(labels))


def test_evaluation_weighs_images_not_batches_and_puts_the_mode_back():
    network = Constant().train()
    before = torch.get_rng_state()
    loss, accuracy = TwoBatches().evaluate(network, "test")
    assert accuracy == 0.75
    assert loss == pytest.approx((3 * math.log(4 / 3) + math.log(4)) / 4)
    assert network.training and torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_metrics_know_what_is_better():
    records = [
        {"step": step, **metric.figures(loss, accuracy)}
        for metric in METRICS.values()
        for step, loss, accuracy in ((1, 2 * math.log(2), 0.25), (2, 0.5 * math.log(2), 0.5), (3, 3.0, 0.75))
    ]
    accuracies, bits = records[:3], records[3:]
    assert [record["bits_per_character"] for record in bits[:2]] == pytest.approx([2, 0.5])
    assert ACCURACY.best(accuracies)["step"] == 3 and ACCURACY.best(accuracies[:1] * 2) is accuracies[0]
    assert BITS_PER_CHARACTER.best(bits)["step"] == 2
