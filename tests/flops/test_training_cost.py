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


# -- the methods whose masks are not the same all along ------------------------------------------------------------


def conv_and_linear():
    """A convolution of 36 weights, used at 16 positions each, and a linear of 320 weights, used once."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.Flatten(), nn.Linear(64, 5, bias=False))


REUSE = {"0.weight": 16, "2.weight": 1}
DENSE = 36 * 16 + 320


def run(method, steps, total_steps=60, **options):
    """The module and its rewirer after `steps` steps, and the forward MACs at the masks that each of them had."""
    sparse = fxsparse.sparsify(
        conv_and_linear(), torch.randn(1, 1, 6, 6), method, sparsity=0.5, distribution={"*": 0.5}, update_interval=5,
        drop_fraction=0.1, verify=False, **options,
    )  # fmt: skip
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    rewirer = sparse.attach(optimizer, total_steps)
    macs = []
    for _ in range(steps):
        macs.append(sum(int(mask.sum()) * REUSE[name] for name, mask in sparse.masks.items()))
        sparse(torch.randn(4, 1, 6, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return sparse, rewirer, macs


def test_pruning_costs_three_times_the_expected_forward_pass():
    begin, end, interval, total = 10, 40, 7, 60
    sparse, rewirer, macs = run("pruning", total, begin=begin, end=end, interval=interval)
    # By the rule: of n weights half go, floor(n / 2 (1 - (1 - p)^3)) of them after each pruning.
    expected, gone = [], {"0.weight": 0, "2.weight": 0}
    for t in range(total):
        expected.append(
            sum(reuse * (n - gone[name]) for (name, reuse), n in zip(REUSE.items(), (36, 320), strict=True))
        )
        if t == end or (begin <= t < end and (t - begin) % interval == 0):
            share = 1 - (1 - (t - begin) / (end - begin)) ** 3
            gone = {"0.weight": int(18 * share + 1e-9), "2.weight": int(160 * share + 1e-9)}
    assert macs == expected
    fresh = fxsparse.sparsify(
        conv_and_linear(), torch.randn(1, 1, 6, 6), "pruning", sparsity=0.5, distribution={"*": 0.5},
        begin=begin, end=end, interval=interval,
    )  # fmt: skip
    planned, realised = planned_cost(fresh, total), realised_cost(sparse, rewirer)
    assert planned.macs == realised.macs == 3 * sum(expected)
    assert planned.dense_macs == realised.dense_macs == 3 * total * DENSE
    assert planned.dense_gradient_steps == 0
    assert planned.ratio == pytest.approx(average_step("pruning", sum(expected) / total, DENSE) / (3 * DENSE))


@pytest.mark.parametrize("stop", [23, 60])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("pruning", {"scope": "global"}), ("snip", {"batches": 3}), ("snip", {"batches": 3, "scope": "global"}),
        ("deepr", {"noise": 1.0}), ("set", {"redistribution": "gradient"}), ("dsr", {"threshold": 0.05}),
    ],
)  # fmt: skip
def test_without_dense_gradients_a_run_costs_three_times_its_forward_passes(method, options, stop):
    sparse, rewirer, macs = run(method, stop, **options)
    assert realised_cost(sparse, rewirer).macs == 3 * sum(macs)
    if method in ("set", "dsr"):
        assert len(set(macs)) > 2  # connections have moved to where they cost more, or less
    else:
        assert (macs[0] == DENSE) == (method != "deepr")


def test_snfs_costs_two_forward_passes_and_a_dense_one():
    sparse, rewirer, macs = run("snfs", 60)
    cost = realised_cost(sparse, rewirer)
    assert (cost.steps, cost.dense_gradient_steps) == (60, 60)
    assert cost.macs == sum(2 * each + DENSE for each in macs)
    assert len(set(macs)) > 2
    fresh = planned_cost(run("snfs", 0)[0], 60)
    assert fresh.macs == 60 * (2 * DENSE // 2 + DENSE)  # the plan holds the allocated densities


def test_rigl_with_redistribution_by_its_history():
    sparse, rewirer, macs = run("rigl-sg", 60)
    cost = realised_cost(sparse, rewirer)
    updates = [5, 10, 15, 20, 25, 30, 35, 40]
    assert cost.dense_gradient_steps == len(updates)
    assert len(set(macs)) > 2
    by_step = sum(2 * each + DENSE if t in updates else 3 * each for t, each in enumerate(macs))
    assert cost.macs == pytest.approx(by_step, rel=0.01)  # which steps they were, the ledger does not look


def test_snip_and_deepr_as_planned():
    snip = planned_cost(run("snip", 0, batches=3)[0], 60)
    assert snip.macs == 3 * (3 * DENSE + 57 * DENSE // 2)
    assert snip.dense_gradient_steps == 0
    assert realised_cost(*run("snip", 60, batches=3)[:2]).macs == snip.macs
    deepr = planned_cost(run("deepr", 0)[0], 60)
    assert deepr.macs == 60 * 3 * DENSE // 2


@pytest.mark.parametrize(("semantics", "updates"), [("paper", 8), ("rigl-tf", 10), ("report", 9)])
def test_the_planned_update_steps_are_those_that_are_made(semantics, updates):
    # t_end = 45: 5, ..., 40; 0, ..., 45; 4, ..., 44.
    choices = {"preset": semantics, "initial_masks": "exact"}
    sparse, rewirer, _ = run("rigl", 60, semantics=choices)
    assert planned_cost(sparse, 60) == realised_cost(sparse, rewirer)
    assert realised_cost(sparse, rewirer).dense_gradient_steps == updates


def test_every_method_is_in_the_table():
    for method in fxsparse.methods():
        assert average_step(method, 30, 100) > 0
    for method in ("rigl-sg", "rigl-sm"):
        assert average_step(method, 20, 100, update_interval=9) == pytest.approx((27 * 20 + 40 + 100) / 10)
    for method in ("dsr", "deepr", "snip", "lottery"):
        assert average_step(method, 20, 100) == 60
