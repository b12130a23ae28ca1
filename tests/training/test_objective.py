"""The loss and the evaluation, on numbers worked out by hand."""

import math

import pytest
import torch
from torch import nn

from fxsparse.training.objective import evaluate, loss_and_logits

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


def test_evaluation_weighs_images_not_batches_and_puts_the_mode_back():
    network = Constant().train()
    batches = [(torch.zeros(3, 1), torch.tensor([1, 1, 1])), (torch.zeros(1, 1), torch.tensor([0]))]
    before = torch.get_rng_state()
    loss, accuracy = evaluate(network, batches)
    assert accuracy == 0.75
    assert loss == pytest.approx((3 * math.log(4 / 3) + math.log(4)) / 4)
    assert network.training and torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
