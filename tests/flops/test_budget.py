"""Budgets in FLOPs: met to one part in a thousand, or refused with what is in reach."""

import pytest
import torch
from torch import nn

import fxsparse
import fxsparse.models as models
from fxsparse.flops import plan_flops


@pytest.mark.parametrize("distribution", ["erk", "er", "uniform"])
@pytest.mark.parametrize("budget", [0.1, 0.2, 0.5, 0.9])
def test_a_budget_is_met(distribution, budget):
    with torch.device("meta"):
        model, x = models.build("resnet50_cifar"), torch.empty(1, 3, 32, 32)
    assert plan_flops(model, x, flops=budget, distribution=distribution).ratio == pytest.approx(budget, rel=1e-3)


def test_sparsify_with_a_budget():
    model = models.build("wide_resnet22_2")
    x = models.example_input("wide_resnet22_2", batch=1)
    sparse = fxsparse.sparsify(model, x, flops=0.2, verify=False)
    assert sparse.flops().ratio == pytest.approx(0.2, rel=1e-3)
    assert 0.85 < sparse.sparsity < 0.9
    for options in ({"dense": ["first", "last"]}, {"exclude": "first"}, {"explicit": {"fc.weight": 0.5}}):
        sparse = fxsparse.sparsify(model, x, flops=0.3, verify=False, **options)
        assert sparse.flops().ratio == pytest.approx(0.3, rel=1e-3)
    with pytest.raises(fxsparse.ConfigError, match=r"sparsity.*flops.*not both"):
        fxsparse.sparsify(model, x, sparsity=0.5, flops=0.2)


def test_allocate_with_a_budget_from_shapes_and_macs():
    shapes = {"a": (50, 50), "b": (100, 100)}
    found = fxsparse.allocate(shapes, flops=0.25, macs={"a": 2_500 * 4, "b": 10_000}, distribution="erk")
    cost = (1 - found["a"]) * 10_000 + (1 - found["b"]) * 10_000
    assert cost == pytest.approx(0.25 * 20_000, rel=2e-3)
    with pytest.raises(fxsparse.ConfigError, match="flops together with macs"):
        fxsparse.allocate(shapes, flops=0.25)
    with pytest.raises(fxsparse.ConfigError, match="give a sparsity"):
        fxsparse.allocate(shapes)


def test_budgets_out_of_reach():
    shapes, macs = {"a": (10, 10), "b": (100, 100)}, {"a": 5_000, "b": 10_000}
    with pytest.raises(fxsparse.AllocationError, match=r"0.1 of dense is out of reach.*between 0.33\d+ and 1\."):
        fxsparse.allocate(shapes, flops=0.1, macs=macs, dense=["a"])
    with pytest.raises(fxsparse.AllocationError, match=r"outside \(0, 1\]"):
        fxsparse.allocate(shapes, flops=0.0, macs=macs)
    with pytest.raises(fxsparse.AllocationError, match=r"nearest to 0.3 .* whole weights allow"):
        fxsparse.allocate({"a": (2, 2)}, flops=0.3, macs={"a": 4})
    with pytest.raises(fxsparse.AllocationError, match=r"out of reach.*0.5 of it has no mask"):
        fxsparse.allocate(shapes, flops=0.4, macs=macs, other_macs=15_000)


def test_one_is_dense():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(1, 8)
    assert plan_flops(model, x, flops=1.0).ratio == 1.0


def test_a_training_run_with_a_budget():
    from fxsparse.training.config import TrainConfig
    from fxsparse.training.experiment import sparsify

    model, x = models.build("small_resnet"), models.example_input("small_resnet")
    sparse = sparsify(model, x, TrainConfig(data="digits", flops=0.3, verify=False).resolved())
    assert sparse.flops().ratio == pytest.approx(0.3, rel=1e-3)
    with pytest.raises(fxsparse.ConfigError, match="flops"):
        TrainConfig(data="digits", flops=1.5)
