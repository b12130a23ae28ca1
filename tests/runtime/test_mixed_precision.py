"""bf16 autocast, a GradScaler and channels_last: what masks are chosen from, and how they lie in memory."""

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import rigl_update
from fxsparse.core.masking import floor_count


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4)
    )


def make(model, x, fused=False, **options):
    sparse = fxsparse.sparsify(model, x, "rigl", sparsity=0.6, update_interval=2, stop_fraction=1.0, **options)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9, fused=fused)
    return sparse, optimizer, sparse.attach(optimizer, total_steps=100)


def backward(sparse, x, dtype=torch.bfloat16):
    with torch.autocast("cpu", dtype=dtype):
        loss = (sparse(x) - 1).square().mean()
    loss.backward()


def test_masks_are_chosen_from_fp32_magnitudes_under_autocast():
    """All magnitudes of a layer round to one number in bf16, and of equals the last ones go."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    x = torch.randn(4, 8)
    sparse, optimizer, rewirer = make(model, x, distribution="uniform", dense=())
    mask, weight = sparse.masks["0.weight"], sparse.get_parameter("0.weight")
    with torch.no_grad():
        mask.fill_(False).view(-1)[:32] = True
        weight.copy_((1 + 1e-5 * torch.arange(64.0).view(8, 8)) * mask)
    assert weight[mask].bfloat16().unique().numel() == 1 and weight[mask].unique().numel() == 32
    rewirer.step_count = 2
    rewirer._set_gate()
    backward(sparse, x)
    assert weight.grad.dtype == torch.float32
    k = floor_count(rewirer.schedule.fraction(2), 32)
    least = weight.detach()[mask].sort().values[:k]
    expected = rigl_update(weight.detach().clone(), weight.grad.clone(), mask.clone(), k)
    kept_before, dropped = mask.clone(), torch.isin(weight.detach(), least) & mask
    optimizer.step()
    assert torch.equal(mask, expected) and len(rewirer.history) == 1
    # of those that were active, all that are gone are among the k least in fp32
    assert k > 4 and (kept_before & ~mask).any() and not (kept_before & ~mask & ~dropped).any()
    assert weight.dtype == torch.float32


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_of_fp16_is_no_update_step(fused):
    """An infinite gradient on the update step: the scaler skips, the rewiring waits for the step that is made.

    A fused optimizer is called even so, and skips by itself.
    """
    x = torch.randn(4, 3, 8, 8)
    sparse, optimizer, rewirer = make(conv_net(), x, fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = {name: mask.clone() for name, mask in sparse.masks.items()}
    counts, gates = [], []
    for infinite in (False, False, True, True, False, False):
        optimizer.zero_grad()
        gates.append(bool(sparse.dense_gradient))
        loss = sparse(x * float("inf") if infinite else x).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        counts.append((rewirer.step_count, len(rewirer.history)))
    assert counts == [(1, 0), (2, 0), (2, 0), (2, 0), (3, 1), (4, 1)]
    assert gates == [False, False, True, True, True, False]
    assert rewirer.history[0].skipped is None
    assert any(not torch.equal(mask, before[name]) for name, mask in sparse.masks.items())


def lies_like(mask, weight):
    return mask.stride() == weight.stride()


def channels_last_weights(sparse):
    weights = {name: sparse.get_parameter(name) for name in sparse.masks}
    return {name: weight for name, weight in weights.items() if weight.dim() == 4 and weight.shape[2] > 1}


@pytest.mark.parametrize("when", ["before", "after"])
def test_masks_lie_in_memory_as_their_weights_do(when):
    """channels_last of the model that is sparsified, or of the sparse module."""
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    model = conv_net()
    if when == "before":
        model = model.to(memory_format=torch.channels_last)
    sparse, optimizer, rewirer = make(model, x)
    if when == "after":
        sparse.to(memory_format=torch.channels_last)
    weights = channels_last_weights(sparse)
    assert len(weights) == 2
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights.values())
    for name, weight in weights.items():
        assert lies_like(sparse.masks[name], weight), name
    for _ in range(4):
        optimizer.zero_grad()
        backward(sparse, x)
        optimizer.step()
    assert len(rewirer.history) == 1
    for name, weight in weights.items():
        assert lies_like(sparse.masks[name], weight) and lies_like(weight.grad, weight), name


def test_channels_last_trains_as_contiguous_does():
    """The same masks in the same places: the layout in memory is no part of what is chosen."""
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        sparse, optimizer, rewirer = make(conv_net().double().to(memory_format=layout), x.to(memory_format=layout))
        for _ in range(7):
            optimizer.zero_grad()
            sparse(x.to(memory_format=layout)).square().mean().backward()
            optimizer.step()
        assert len(rewirer.history) == 3
        found.append(sparse)
    plain, last = found
    for name, mask in plain.masks.items():
        assert torch.equal(mask, last.masks[name])
        torch.testing.assert_close(plain.get_parameter(name), last.get_parameter(name))
        assert (last.get_parameter(name)[~mask] == 0).all()
