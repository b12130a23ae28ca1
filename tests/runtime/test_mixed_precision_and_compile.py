"""Methods under autocast with a GradScaler, and under torch.compile: the same masks as without."""

import pytest
import torch
from torch import nn

import fxsparse

METHODS = {
    "set": {}, "rigl": {}, "rigl-sg": {}, "snfs": {}, "snfs by the optimizer": {"momentum": "optimizer"},
    "dsr": {"threshold": 0.05}, "deepr": {"noise": 0.5}, "pruning": {}, "snip": {"batches": 2},
}  # fmt: skip


def make(case, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6))
    return fxsparse.sparsify(
        model, torch.randn(4, 12), case.split()[0], sparsity=0.6, update_interval=3, **METHODS[case], **options
    )


def train(sparse, steps, fused=False, forward=None, scaled=False, infinite=()):
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9, fused=fused)
    rewirer = sparse.attach(optimizer, total_steps=20)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6, enabled=scaled)
    batch = 0
    for call in range(steps + len(infinite)):
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(16, 12, generator=generator)
        if call in infinite:
            x = x * float("inf")
        else:
            batch += 1
        optimizer.zero_grad()
        loss = (sparse if forward is None else forward)(x).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return rewirer


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", METHODS)
def test_skipped_steps_leave_no_trace(case, fused):
    """Scales are powers of two: what a GradScaler changes is which steps are skipped, and nothing else."""
    plain, scaled = make(case), make(case)
    expected = train(plain, 14, fused)
    rewirer = train(scaled, 14, fused, scaled=True, infinite=(3, 5, 6, 10))
    assert rewirer.step_count == expected.step_count == 14
    assert [r.step for r in rewirer.history] == [r.step for r in expected.history]
    for name, mask in plain.masks.items():
        assert torch.equal(mask, scaled.masks[name])
        torch.testing.assert_close(scaled.get_parameter(name), plain.get_parameter(name))
        assert (scaled.get_parameter(name)[~mask] == 0).all()
    mine, others = (r.state_dict()["method_state"].get("averages", {}) for r in (rewirer, expected))
    for name, average in others.items():
        torch.testing.assert_close(mine[name], average)


@pytest.mark.parametrize("case", ["set", "rigl", "snfs", "snfs by the optimizer", "snip"])
def test_compiled_with_aot_autograd(case):
    """With the gate closed, open on some steps, and open always; the compiler guards on it."""
    torch._dynamo.reset()
    plain, compiled = make(case), make(case)
    expected = train(plain, 8)
    rewirer = train(compiled, 8, forward=torch.compile(compiled, backend="aot_eager"))
    assert rewirer.history == expected.history
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[key], value)
