"""Channels on a CUDA device: masked and compact training agree, and inactive channels are 0."""

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import models

pytestmark = pytest.mark.gpu


def run(compact, method="rigl-struct", steps=12):
    torch.manual_seed(0)
    model = models.wide_resnet22_2(num_classes=10).cuda().double()
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64, device="cuda")
    sparse = fxsparse.sparsify(model, x, method, granularity="channel", sparsity=0.7, update_interval=4)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.01, momentum=0.9, fused=True)
    rewirer = sparse.attach(optimizer, steps + 4, compact=compact)
    losses = []
    for step in range(steps):
        generator = torch.Generator("cuda").manual_seed(step)
        batch = torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64, device="cuda")
        target = torch.randint(10, (8,), generator=generator, device="cuda")
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(sparse(batch), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, sparse, rewirer


@pytest.mark.parametrize("method", ["rigl-struct", "set", "static", "pruning"])
def test_the_compact_run_is_the_masked_one(method):
    masked, compact = run(False, method), run(True, method)
    assert compact[0] == pytest.approx(masked[0], rel=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(masked[1].masks.values(), compact[1].masks.values(), strict=True))
    assert sum(p.numel() for p in compact[1].parameters()) < sum(p.numel() for p in masked[1].parameters())
    for name, mask in masked[1].masks.items():
        assert mask.is_cuda and not masked[1].get_parameter(name)[~mask].any()
