"""Narrower dense models: parameters counted by hand and on the models made, and the same share of every group."""

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse.channels.narrowing import count_without, narrow


def net(width=24):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 10),
    )


X = torch.randn(2, 3, 8, 8)


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def size_of_widths(a, b):
    return 27 * a + 2 * a + 9 * a * b + b + 160 * b + 10


def test_parameters_by_hand():
    shapes = {name: p.shape for name, p in net().named_parameters()}
    first, second, _ = fxsparse.channel_groups(net(), X).groups
    assert count_without(shapes, []) == size(net()) == size_of_widths(24, 48)
    assert count_without(shapes, first.atoms[:5]) == size_of_widths(19, 48)
    assert count_without(shapes, [*first.atoms[:5], *second.atoms[7:10]]) == size_of_widths(19, 45)


@pytest.mark.parametrize("share", [0.5, 0.2, 0.05])
def test_the_largest_model_that_fits_with_groups_in_step(share):
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = int(share * size(model))
    small = narrow(model, X, wanted, seed=3)
    a, b = small.get_parameter("0.weight").shape[0], small.get_parameter("3.weight").shape[0]
    assert size(small) == size_of_widths(a, b) <= wanted
    assert abs(a / 24 - b / 48) <= 1 / 24  # the same share of both groups
    assert size_of_widths(a + 1, b + 2) > wanted  # the next share at which both groups have more
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert small(X).shape == (2, 10)


def test_the_draw_depends_on_the_seed_alone():
    model = net()
    one, same, other = (narrow(model, X, 2000, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.get_parameter("0.weight"), same.get_parameter("0.weight"))
    assert not torch.equal(one.get_parameter("0.weight"), other.get_parameter("0.weight"))


def test_sparsify_makes_it_and_it_trains():
    model = net()
    sparse = fxsparse.sparsify(model, X, "small-dense", sparsity=0.8)
    static = fxsparse.sparsify(model, X, "static", sparsity=0.8)
    wanted = size(static) - sum(int((~mask).sum()) for mask in static.masks.values())
    assert 0.9 * wanted < size(sparse) <= wanted
    assert sparse.sparsity == 0.0
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05)
    sparse.attach(optimizer, total_steps=10)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(sparse(X), torch.tensor([1, 2]))
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_what_cannot_go_is_said():
    with pytest.raises(
        fxsparse.AllocationError, match="small-dense: with all channels removed that can be, 30 parameters"
    ):
        fxsparse.sparsify(nn.Linear(10, 3, bias=False), torch.randn(2, 10), "small-dense", sparsity=0.9)
