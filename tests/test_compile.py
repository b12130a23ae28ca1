"""`torch.compile`: one graph for ordinary steps, one for update steps, and no more while masks change."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxsparse
from fxsparse import models


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


NETS = {
    "small_resnet": (models.small_resnet, (4, 1, 8, 8)),
    "mlp": (lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 10)), (4, 12)),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_two_graphs_over_many_rewirings_and_the_masks_of_eager_mode(net, method):
    make, shape = NETS[net]
    torch.manual_seed(0)
    model = make()
    counter = CompileCounterWithBackend("aot_eager")

    def run(compiled):
        sparse = fxsparse.sparsify(model, torch.zeros(shape), method, sparsity=0.8, update_interval=4)
        network = torch.compile(sparse, backend=counter, fullgraph=True) if compiled else sparse
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
        rewirer = sparse.attach(optimizer, total_steps=40)
        generator = torch.Generator().manual_seed(1)
        for step in range(24):
            optimizer.zero_grad()
            x, y = torch.randn(shape, generator=generator), torch.randint(0, 10, (4,), generator=generator)
            nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
            if compiled and step == 5:  # an ordinary step and the update step 4 were seen
                assert counter.frame_count == (2 if method == "rigl" else 1)
        assert sum(bool(sum(record.changed.values())) for record in rewirer.history) >= 4
        return sparse

    eager, compiled = run(False), run(True)
    assert counter.frame_count == (2 if method == "rigl" else 1)
    for name, mask in eager.masks.items():
        assert torch.equal(mask, compiled.masks[name]), name


def test_the_compiled_gradient_is_masked_or_dense_like_the_eager_one():
    torch.manual_seed(0)
    sparse = fxsparse.sparsify(nn.Linear(6, 3), torch.zeros(2, 6), sparsity=0.5)
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 6)
    for dense in (False, True, False):
        sparse.dense_gradient = dense
        gradients = []
        for network in (sparse, compiled):
            sparse.zero_grad()
            network(x).square().sum().backward()
            gradients.append(sparse.weight.grad.clone())
        assert torch.equal(*gradients)
        outside = gradients[1][~sparse.masks["weight"]]
        assert bool(outside.any()) is dense
