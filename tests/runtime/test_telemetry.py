"""What a run says about itself, against plain counting over recorded masks; and the guard against emptied layers."""

import warnings

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import FxSparseWarning

METHODS = {
    "static": {}, "set": {}, "rigl": {}, "rigl-sg": {}, "rigl-sm": {}, "snfs": {}, "dsr": {"threshold": 0.05},
    "deepr": {"noise": 1.0, "l1": 0.1}, "pruning": {}, "snip": {"batches": 2},
}  # fmt: skip


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 2), nn.Flatten(), nn.Linear(36, 6))


def train(sparse, optimizer, steps, each=lambda: None):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(8, 2, 6, 6, generator=generator), torch.randint(0, 6, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(sparse(x), y).backward()
        optimizer.step()
        each()


@pytest.mark.filterwarnings("ignore:.*about to be emptied")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [0, 5, 17])
def test_density_exploration_and_dead_units_by_brute_force(method, steps):
    sparse = fxsparse.sparsify(
        small_net(), torch.randn(2, 2, 6, 6), method, sparsity=0.85, update_interval=3, verify=False, **METHODS[method]
    )
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9)
    rewirer = sparse.attach(optimizer, total_steps=20)
    seen = []

    def record():
        seen.append({name: mask.tolist() for name, mask in sparse.masks.items()})

    record()
    train(sparse, optimizer, steps, record)
    for row in rewirer.telemetry():
        masks = [torch.tensor(each[row.name]).numpy() for each in seen]
        last = masks[-1]
        assert (row.active, row.size) == (last.sum(), last.size)
        assert row.density == last.sum() / last.size
        ever = sum(any(mask.flat[i] for mask in masks) for i in range(last.size))
        assert row.explored == ever / last.size
        assert (row.outputs, row.inputs) == last.shape[:2]
        assert row.dead_outputs == sum(not last[i].any() for i in range(last.shape[0]))
        assert row.dead_inputs == sum(not last[:, i].any() for i in range(last.shape[1]))
    if method in ("pruning", "snip"):
        assert all(row.explored == 1.0 for row in rewirer.telemetry())  # it starts dense
    if method == "static":
        assert all(row.explored == row.density for row in rewirer.telemetry())


def test_masks_loaded_after_attach_are_where_exploration_begins():
    sparse, trained = (
        fxsparse.sparsify(small_net(), torch.randn(2, 2, 6, 6), "rigl", sparsity=0.85, seed=seed) for seed in (0, 1)
    )
    rewirer = sparse.attach(torch.optim.SGD(sparse.parameters(), lr=0.1), total_steps=10)
    sparse.load_state_dict(trained.state_dict())
    assert all(row.explored == row.density for row in rewirer.telemetry())


def test_churn_and_grown_gradient_by_hand(bench):
    # k = 2 of 4: at the first rewiring 4 (gradient 3) and 5 (gradient -4) grow, at the second 5, 4 are dropped, and of
    # 1, 2, 4, 5 two grow: 4 comes straight back and 1 is new.
    run = bench([[4.0, 1.0, 2.0, 3.0, 0.0, 0.0]], [[1, 1, 1, 1, 0, 0]], "rigl", update_interval=2)
    assert run.rewirer.telemetry()[0].churn == 0.0
    assert run.rewirer.telemetry()[0].grown_gradient_norm is None
    gradients = [[0.0] * 6, [0.0] * 6, [1.0, 1.0, 1.0, 1.0, 3.0, -4.0], [0.0] * 6, [9.0, 2.0, 0.0, 0.0, -5.0, 0.0]]
    for gradient in gradients:
        run.step(gradient)
    (row,) = run.rewirer.telemetry()
    assert [record.changed["layers.0.weight"] for record in run.rewirer.history] == [2, 1]
    assert row.churn == (2 / 4 + 1 / 4) / 2
    assert [r.grown_gradient_norm["layers.0.weight"] for r in run.rewirer.history] == [5.0, 2.0]
    assert row.grown_gradient_norm == 2.0
    assert row.explored == 1.0
    report = run.rewirer.report()
    assert "layers.0.weight" in report and "ever active" in report and "0.3750" in report


def test_a_skipped_rewiring_is_no_churn(bench):
    run = bench([[4.0, 1.0, 2.0, 3.0, 0.0, 0.0]], [[1, 1, 1, 1, 0, 0]], "rigl", update_interval=1)
    run.step([0.0] * 6)
    run.step([1.0, 1.0, 1.0, 1.0, 3.0, -4.0])
    with pytest.warns(FxSparseWarning, match="not finite"):
        run.step([float("nan")] * 6)
    assert run.rewirer.telemetry()[0].churn == 0.5


def test_the_units_of_a_transposed_convolution():
    # Its weight is (in, out, k): row 0 of the mask is an input, column 0 an output.
    sparse = fxsparse.sparsify(nn.ConvTranspose1d(3, 2, 4), torch.randn(1, 3, 5), "static", sparsity=0.5)
    sparse.masks["weight"].fill_(True)
    sparse.masks["weight"][:, 0] = False
    (row,) = sparse.attach(torch.optim.SGD(sparse.parameters(), lr=0.1), total_steps=10).telemetry()
    assert (row.outputs, row.dead_outputs, row.inputs, row.dead_inputs) == (2, 1, 3, 0)


# -- the guard --------------------------------------------------------------------------------------------------


def test_a_layer_about_to_be_emptied_is_named_once(bench):
    # Globally, the second layer's 20 small weights go first; 2 of the 10 are left of it at the end, and then none.
    weights = [[float(i) for i in range(100, 140)], [0.01 * i for i in range(1, 20)] + [125.5]]
    run = bench(weights, [[1] * 40, [1] * 20], "pruning", targets=[15, 15], scope="global", begin=0, end=4, interval=1)
    with pytest.warns(FxSparseWarning) as caught:
        for _ in range(7):
            run.step([0.0] * 40, [0.0] * 20)
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith(
        "layers.1.weight is about to be emptied: 1 of the 15 weights that its allocation gives it"
    )
    assert "dense=('layers.1.weight',)" in message
    assert run.counts[1] in (0, 1)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "dsr"])
def test_no_false_alarm_in_an_ordinary_run(method):
    sparse = fxsparse.sparsify(
        small_net(), torch.randn(2, 2, 6, 6), method, sparsity=0.8, update_interval=3, **METHODS[method]
    )
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    sparse.attach(optimizer, total_steps=30)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FxSparseWarning)
        train(sparse, optimizer, 30)
