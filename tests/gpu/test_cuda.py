"""The runtime on a CUDA device: the same decisions as on the CPU, the same invariants."""

import copy

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import models, rigl_update, set_update

pytestmark = pytest.mark.gpu


def test_the_rules_choose_the_same_positions_as_on_the_cpu():
    generator = torch.Generator().manual_seed(0)
    for size in (7, 1000, 300_000):
        weight = torch.randint(-3, 4, (size,), generator=generator).float()  # many ties
        grad = torch.randint(-3, 4, (size,), generator=generator).float()
        mask = torch.rand(size, generator=generator) < 0.4
        k = int(mask.sum()) // 3
        on_cpu = rigl_update(weight, grad, mask, k)
        assert torch.equal(rigl_update(weight.cuda(), grad.cuda(), mask.cuda(), k).cpu(), on_cpu)
        first = set_update(weight, mask, k, torch.Generator().manual_seed(1))
        second = set_update(weight.cuda(), mask.cuda(), k, torch.Generator().manual_seed(1))
        assert torch.equal(first, second.cpu())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_the_invariants_hold_with_mixed_precision(method, dtype):
    torch.manual_seed(0)
    model = models.wide_resnet22_2().cuda().to(memory_format=torch.channels_last)
    x = torch.randn(32, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (32,), device="cuda")
    sparse = fxsparse.sparsify(model, x, method, sparsity=0.9, update_interval=5)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True)
    rewirer = sparse.attach(optimizer, total_steps=40)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
    counts = sparse.active_counts
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
            loss = nn.functional.cross_entropy(sparse(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert sparse.active_counts == counts
    assert len(rewirer.history) >= 4
    for name, mask in sparse.masks.items():
        weight = sparse.get_parameter(name)
        assert (weight[~mask] == 0).all()
        assert (optimizer.state[weight]["momentum_buffer"][~mask] == 0).all()


def test_a_module_moves_between_devices():
    model = models.small_resnet()
    sparse = fxsparse.sparsify(model, torch.randn(2, 1, 8, 8), sparsity=0.8)
    x = torch.randn(4, 1, 8, 8)
    expected = sparse.eval()(x)
    moved = copy.deepcopy(sparse).cuda()
    torch.testing.assert_close(moved(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
    on_device = fxsparse.sparsify(model.cuda(), x.cuda(), sparsity=0.8)
    for name, mask in sparse.masks.items():
        assert torch.equal(on_device.masks[name].cpu(), mask)
