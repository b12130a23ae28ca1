"""The training ledger: the supplement's table by hand, and the backward pass against autograd's own products."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxsparse
from fxsparse.flops import average_step, planned_cost, realised_cost, step_cost, training_cost
from fxsparse.flops.training import expected_flops
from fxsparse.runtime.schedule import gradual_sparsity


def test_average_steps_by_hand():
    assert average_step("dense", 20, 100) == 300
    assert average_step("static", 20, 100) == average_step("set", 20, 100) == average_step("small-dense", 20, 100) == 60
    assert average_step("rigl", 20, 100, update_interval=9) == pytest.approx((27 * 20 + 40 + 100) / 10)
    assert average_step("snfs", 20, 100) == 140
    assert average_step("pruning", 20, 100) == 60
    with pytest.raises(fxsparse.ConfigError, match=r"'rigll' is not one of dense, .*did you mean rigl"):
        average_step("rigll", 1, 1)


@pytest.fixture
def sparse():
    model = nn.Sequential(nn.Linear(10, 20, bias=False), nn.ReLU(), nn.Linear(20, 5, bias=False))
    return lambda method: fxsparse.sparsify(
        model, torch.randn(1, 10), method, sparsity=0.5, distribution={"*": 0.5}, update_interval=10, stop_fraction=0.5
    )


def test_planned_cost_by_hand(sparse):
    dense, kept = 10 * 20 + 20 * 5, 150
    rigl = planned_cost(sparse("rigl"), 100)  # rewires at steps 10, 20, 30, 40
    assert (rigl.steps, rigl.dense_gradient_steps) == (100, 4)
    assert rigl.macs == 96 * 3 * kept + 4 * (2 * kept + dense)
    assert rigl.dense_macs == 100 * 3 * dense
    assert rigl.ratio == pytest.approx(sparse("rigl").training_flops_ratio(100))
    for method in ("static", "set"):
        assert planned_cost(sparse(method), 100).macs == 100 * 3 * kept
    assert planned_cost(sparse("dense"), 100).ratio == 1.0
    assert "planned: 9.12e+04 FLOPs in 100 steps, 4 with dense gradients" in rigl.describe("planned")


def test_realised_cost_counts_the_updates_that_were_made(sparse):
    module = sparse("rigl")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    rewirer = module.attach(optimizer, total_steps=100)
    for _ in range(25):  # the run is stopped early
        module(torch.randn(4, 10)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    cost = realised_cost(module, rewirer)
    assert (cost.steps, cost.dense_gradient_steps) == (25, 2)
    assert cost.macs == 23 * 3 * 150 + 2 * (2 * 150 + 300)


def test_moving_densities_are_averaged(sparse):
    report = sparse("static").flops()
    full = {"0.weight": 200, "2.weight": 100}
    half = {"0.weight": 100, "2.weight": 50}
    phases = [(10, report.at(full)), (30, report.at(half))]
    assert training_cost(phases, 0).macs == 3 * (10 * 300 + 30 * 150)
    mean = expected_flops(report, lambda step: full if step < 10 else half, 40)
    assert mean == 2 * (10 * 300 + 30 * 150) / 40
    assert expected_flops(report, lambda step: full if step < 10 else half, 40, stride=10) == mean


def test_gradual_pruning_schedule():
    schedule = {"begin": 10, "end": 30, "interval": 5, "final": 0.8}
    assert [gradual_sparsity(step, **schedule) for step in (0, 9, 10, 14)] == [0.0] * 4
    assert gradual_sparsity(20, **schedule) == pytest.approx(0.8 * (1 - 0.5**3))
    assert gradual_sparsity(24, **schedule) == gradual_sparsity(20, **schedule)
    assert gradual_sparsity(30, **schedule) == gradual_sparsity(99, **schedule) == 0.8


def trained(model, x, training=True):
    """Products that autograd makes, forward and backward, and those of the report."""
    report = fxsparse.count_flops(model, x, training=training)
    with FlopCounterMode(display=False) as counter:
        out = model(*x) if isinstance(x, tuple) else model(x)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
    return report.macs + sum(node.backward for node in report.nodes), counter.get_total_flops() // 2


def test_exact_backward_has_no_input_gradient_for_the_first_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    x = torch.randn(2, 3, 6, 6)
    ours, theirs = trained(model, x)
    assert ours == theirs
    first = 2 * 4 * 3 * 9 * 16
    report = fxsparse.count_flops(model, x)
    assert step_cost(report).dense - step_cost(report, exact_backward=True).dense == first


def test_exact_backward_of_frozen_layers_attention_and_recurrence():
    torch.manual_seed(0)
    frozen = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3))
    frozen[0].requires_grad_(False)
    frozen[1].weight.requires_grad_(False)
    ours, theirs = trained(frozen, torch.randn(2, 4))
    assert ours == theirs
    gru = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 5))
    # FlopCounterMode sees the recurrence's own products on the CPU, forward and backward.
    ours, theirs = trained(gru, torch.randn(3, 2, 4))
    assert ours == theirs

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            q = self.project(x)
            return torch.softmax(q @ x.transpose(1, 2), -1) @ q

    ours, theirs = trained(Attends(), torch.randn(2, 3, 4))
    assert ours == theirs


def test_exact_backward_of_grouped_convolutions_where_the_usual_counter_is_wrong():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.Conv2d(8, 8, 3, groups=2, bias=False))
    x = torch.randn(1, 4, 7, 7)
    report = fxsparse.count_flops(model, x)
    first, second = 8 * 1 * 9 * 25, 8 * 4 * 9 * 9
    assert [node.backward for node in report.nodes] == [first, 2 * second]
    ours, theirs = trained(model, x)
    assert theirs != ours == 2 * first + 3 * second


def test_exact_backward_of_sparse_steps():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 5, bias=False))
    sparse = fxsparse.sparsify(model, torch.randn(1, 4), sparsity=0.5, distribution={"*": 0.5}, verify=False)
    cost = step_cost(sparse.flops(), exact_backward=True)
    assert cost.dense == 2 * 24 + 3 * 30
    assert cost.sparse == 2 * 12 + 3 * 15
    assert cost.dense_gradient == (12 + 24) + (2 * 15 + 30)


def test_exact_backward_of_a_masked_factor():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4, bias=False)

        def forward(self, x):
            return self.layer(x) @ self.layer.weight

    sparse = fxsparse.sparsify(Tied(), torch.randn(3, 6), sparsity=0.5, method="static")
    cost = step_cost(sparse.flops(), exact_backward=True)  # 24 weights, 3 rows: 72 a product, 36 sparse
    assert cost.dense == 2 * 72 + (72 + 72) + 72
    assert cost.sparse == 5 * 36
    assert cost.dense_gradient == 2 * 36 + 36 + 2 * 72
