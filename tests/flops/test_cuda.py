"""On a CUDA device other kernels hide the same operations; the counts stay."""

import pytest
import torch
from torch import nn

import fxsparse
import fxsparse.models as models


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        y = self.attention(x, x, x, need_weights=False)[0]
        return nn.functional.scaled_dot_product_attention(x, y, y, is_causal=True)


CASES = {
    "resnet18": lambda: (models.build("resnet18"), models.example_input("resnet18", batch=1)),
    "swin_t": lambda: (models.build("swin_t"), models.example_input("swin_t", batch=1)),
    "lstm": lambda: (nn.LSTM(8, 16, num_layers=2, bidirectional=True, proj_size=4), torch.randn(5, 3, 8)),
    "gru": lambda: (nn.GRU(8, 16), torch.randn(5, 3, 8)),
    "attention": lambda: (Attends(), torch.randn(2, 6, 16)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_counts_are_those_of_the_cpu(case):
    model, x = CASES[case]()
    here = fxsparse.count_flops(model, x)
    there = fxsparse.count_flops(model.cuda(), x.cuda())
    assert there.macs == here.macs > 0 and not there.unknown
    assert [node.backward for node in there.nodes] == [node.backward for node in here.nodes]
