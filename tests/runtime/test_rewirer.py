"""The runtime's semantics, row by row of the design, with numbers worked out by hand."""

import warnings

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import FxSparseWarning, RuntimeStateError
from fxsparse.runtime.methods import Method, Need, Quota

X = torch.tensor([[0.1, 0.1, 0.1, 0.1, 5.0, 0.05]], dtype=torch.float64)
"""The input of a linear with one output: with loss = output, its gradient is X, whatever the weight."""


def one_site(weight, mask, method="rigl", bias=False, **options):
    """A linear of one output with the given weight and mask, masked by fxsparse."""
    settings = {"sparsity": 0.5, "distribution": {"weight": 0.5}, "decay": "constant", "drop_fraction": 0.5}
    model = nn.Linear(len(weight), 1, bias=bias, dtype=torch.float64)
    sparse = fxsparse.sparsify(model, X[:, : len(weight)], method, **(settings | options))
    with torch.no_grad():
        sparse.weight.copy_(torch.tensor([weight], dtype=torch.float64))
        sparse.masks["weight"].copy_(torch.tensor([mask]).bool())
    sparse.apply_masks_()
    return sparse


def assert_same_state(a, b):
    """Two states of a rewirer, tensors and all."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same_state(a[key], b[key])
    else:
        assert a == b


def step(sparse, optimizer, x=X):
    optimizer.zero_grad()
    sparse(x[:, : sparse.weight.shape[1]]).sum().backward()
    optimizer.step()


def test_one_rewiring_by_hand():
    sparse = one_site([4, 1, 2, 3, 0, 0], [1, 1, 1, 1, 0, 0], update_interval=2, stop_fraction=0.75)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=1.0, momentum=0.5)
    rewirer = sparse.attach(optimizer, total_steps=8)
    # Two ordinary steps: the gradient is 0.1 at active positions; momentum 0.1, then 0.15.
    step(sparse, optimizer)
    torch.testing.assert_close(sparse.weight.data, torch.tensor([[3.9, 0.9, 1.9, 2.9, 0, 0]], dtype=torch.float64))
    assert not rewirer.is_update_step()
    step(sparse, optimizer)
    before = [3.75, 0.75, 1.75, 2.75, 0, 0]
    torch.testing.assert_close(sparse.weight.data, torch.tensor([before], dtype=torch.float64))
    # The third call is an update step (t = 2): k = floor(0.5 * 4) = 2 drops 0.75 and 1.75, at 1 and 2. Of
    # {1, 2, 4, 5} with gradients 0.1, 0.1, 5, 0.05 it grows 4 and, by the tie rule, 1: which is untouched.
    assert rewirer.is_update_step()
    step(sparse, optimizer)
    assert sparse.masks["weight"].tolist() == [[True, True, False, True, True, False]]
    expected = torch.tensor([[3.75, 0.75, 0, 2.75, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(sparse.weight.data, expected)
    momentum = optimizer.state[sparse.weight]["momentum_buffer"]
    torch.testing.assert_close(momentum, torch.tensor([[0.15, 0.15, 0, 0.15, 0, 0]], dtype=torch.float64))
    (record,) = rewirer.history
    assert (record.step, record.drop_fraction, record.changed) == (2, 0.5, {"weight": 1})
    # The next ordinary step starts the new connection from zero momentum: -5; the others from 0.15 / 2 + 0.1.
    step(sparse, optimizer)
    expected = torch.tensor([[3.575, 0.575, 0, 2.575, -5.0, 0]], dtype=torch.float64)
    torch.testing.assert_close(sparse.weight.data, expected)


def test_the_101st_call_is_the_first_update_step():
    sparse = one_site([4, 1, 2, 3, 0, 0], [1, 1, 1, 1, 0, 0])
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.0)
    rewirer = sparse.attach(optimizer, total_steps=1000)
    for _ in range(100):
        step(sparse, optimizer)
    assert rewirer.history == []
    step(sparse, optimizer)
    assert [record.step for record in rewirer.history] == [100]
    for _ in range(900):
        step(sparse, optimizer)
    assert [record.step for record in rewirer.history] == [100, 200, 300, 400, 500, 600, 700]
    assert rewirer.step_count == 1001


def test_no_parameter_moves_in_an_update_step():
    sparse = one_site([4, 1, 2, 3, 0, 0], [1, 1, 1, 1, 0, 0], bias=True, update_interval=1)
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.1, weight_decay=0.5)
    sparse.attach(optimizer, total_steps=100)
    step(sparse, optimizer)
    bias, adam_steps = sparse.bias.clone(), optimizer.state[sparse.bias]["step"].clone()
    kept = sparse.weight[0, 0].clone()
    step(sparse, optimizer)
    assert torch.equal(sparse.bias, bias)
    assert torch.equal(sparse.weight[0, 0], kept)
    assert torch.equal(optimizer.state[sparse.bias]["step"], adam_steps)


def test_update_weights_first_is_the_other_order():
    sparse = one_site([4, 1, 2, 3, 0, 0], [1, 1, 1, 1, 0, 0], update_interval=1)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=1.0)
    sparse.attach(optimizer, total_steps=100, update_weights_first=True)
    step(sparse, optimizer)
    step(sparse, optimizer)
    # 4, 1, 2, 3 minus 0.2 each, then 0.8 and 1.8 dropped; 4 grows, and 1 comes back with what it has.
    expected = torch.tensor([[3.8, 0.8, 0, 2.8, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(sparse.weight.data, expected)
    assert sparse.masks["weight"].tolist() == [[True, True, False, True, True, False]]


def test_set_needs_no_dense_gradient_and_keeps_the_count():
    sparse = one_site([4, 1, 2, 3, 0, 0], [1, 1, 1, 1, 0, 0], "set", update_interval=1)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.0)
    rewirer = sparse.attach(optimizer, total_steps=100)
    for _ in range(60):
        step(sparse, optimizer)
        assert sparse.dense_gradient is False
        assert int(sparse.masks["weight"].sum()) == 4
    assert len(rewirer.history) == 59


def test_static_and_dense_never_rewire():
    for method, active in [("static", 3), ("dense", 6)]:
        model = nn.Linear(6, 1, dtype=torch.float64)
        sparse = fxsparse.sparsify(model, X, method, sparsity=0.5, distribution={"weight": 0.5}, update_interval=1)
        mask = sparse.masks["weight"].clone()
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
        rewirer = sparse.attach(optimizer, total_steps=10)
        for _ in range(10):
            step(sparse, optimizer)
        assert torch.equal(sparse.masks["weight"], mask)
        assert int(mask.sum()) == active
        assert rewirer.history == []


def test_a_non_finite_dense_gradient_skips_the_rewiring_and_warns_once():
    sparse = one_site([4, 1, 2, 3, 0, 0], [1, 1, 1, 1, 0, 0], update_interval=1)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=1.0)
    rewirer = sparse.attach(optimizer, total_steps=100)
    step(sparse, optimizer)
    weight, mask = sparse.weight.clone(), sparse.masks["weight"].clone()
    poisoned = X.clone()
    poisoned[0, 5] = float("nan")
    with pytest.warns(FxSparseWarning, match="step 1 was skipped: a dense gradient was not finite"):
        step(sparse, optimizer, poisoned)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(sparse, optimizer, poisoned)
    assert torch.equal(sparse.weight, weight)
    assert torch.equal(sparse.masks["weight"], mask)
    assert rewirer.skipped_updates == 2
    assert [record.skipped for record in rewirer.history] == ["a dense gradient was not finite"] * 2
    step(sparse, optimizer)
    assert rewirer.history[-1].skipped is None


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(288, 5)
    )


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


@pytest.mark.parametrize("method", ["rigl", "set"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_invariants_hold_at_every_step_with_every_optimizer(method, optimizer):
    sparse = fxsparse.sparsify(small_net(), torch.randn(2, 3, 8, 8), method, sparsity=0.8, update_interval=3)
    optimizer = OPTIMIZERS[optimizer](sparse.parameters())
    rewirer = sparse.attach(optimizer, total_steps=40)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    counts = sparse.active_counts
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(24):
        x, y = torch.randn(16, 3, 8, 8, generator=generator), torch.randint(0, 5, (16,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(sparse(x), y)
        loss.backward()
        is_update = rewirer.is_update_step()
        old = {name: mask.clone() for name, mask in sparse.masks.items()}
        values = {name: p.detach().clone() for name, p in sparse.named_parameters()}
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        assert sparse.active_counts == counts
        for name, mask in sparse.masks.items():
            weight = sparse.get_parameter(name)
            assert (weight[~mask] == 0).all()
            for state in optimizer.state[weight].values():
                # Adagrad's accumulator starts from its own value everywhere; it is cleared like the others.
                if isinstance(state, torch.Tensor) and state.shape == weight.shape and is_update:
                    assert (state[~(mask & old[name])] == 0).all()
            if is_update:
                both = mask & old[name]
                assert torch.equal(weight[both], values[name][both])
                assert (weight[mask & ~old[name]] == 0).all()
            else:
                assert torch.equal(mask, old[name])
    assert len(rewirer.history) == 7
    assert any(sum(record.changed.values()) > 0 for record in rewirer.history)
    assert all(loss == loss for loss in losses)


def test_gradient_accumulation_averages_over_the_window():
    def run(batches):
        model = nn.Linear(8, 4, bias=False, dtype=torch.float64)
        model.weight.data = torch.randint(-8, 9, (4, 8), generator=torch.Generator().manual_seed(1)).double()
        sparse = fxsparse.sparsify(model, torch.ones(1, 8).double(), sparsity=0.5, update_interval=2)
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.5)
        rewirer = sparse.attach(optimizer, total_steps=1000)
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            x = torch.randint(-8, 9, (16, 8), generator=generator).double()
            c = torch.randint(-8, 9, (16, 4), generator=generator).double()
            optimizer.zero_grad()
            for part in range(batches):
                rows = slice(part * 16 // batches, (part + 1) * 16 // batches)
                ((sparse(x[rows]) * c[rows]).sum() / 16).backward()  # every number here is a dyadic fraction
            optimizer.step()
        assert rewirer.step_count == 6
        return sparse

    whole, halves, eighths = run(1), run(2), run(8)
    assert torch.equal(whole.masks["weight"], halves.masks["weight"])
    assert torch.equal(whole.weight, halves.weight)
    assert torch.equal(whole.weight, eighths.weight)


def test_clipping_the_dense_gradient_changes_nothing():
    def run(clip):
        sparse = fxsparse.sparsify(small_net(), torch.randn(2, 3, 8, 8), sparsity=0.8, update_interval=2)
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.0, momentum=0.9)
        sparse.attach(optimizer, total_steps=100)
        generator = torch.Generator().manual_seed(0)
        for _ in range(9):
            x, y = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(0, 5, (8,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(sparse(x), y).backward()
            if clip:
                nn.utils.clip_grad_norm_(sparse.parameters(), 2.0**-10)
            optimizer.step()
        return sparse

    # A learning rate of 0 leaves the masks as the only thing that moves; clipping scales all gradients alike.
    plain, clipped = run(False), run(True)
    for name, mask in plain.masks.items():
        assert torch.equal(mask, clipped.masks[name])


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_grad_scaler_skips_does_not_count(fused):
    sparse = one_site([4, 1, 2, 3, 0, 0], [1, 1, 1, 1, 0, 0], update_interval=2)
    sparse = sparse.float()
    optimizer = torch.optim.SGD(sparse.parameters(), lr=1.0, fused=fused)
    rewirer = sparse.attach(optimizer, total_steps=8)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def scaled_step(x):
        optimizer.zero_grad()
        scaler.scale(sparse(x.float()).sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    infinite = torch.full_like(X, float("inf"))
    scaled_step(X)
    scaled_step(infinite)
    assert rewirer.step_count == 1
    scaled_step(X)
    assert rewirer.step_count == 2
    assert rewirer.is_update_step()
    mask = sparse.masks["weight"].clone()
    scaled_step(infinite)  # the update step is due and skipped: it stays due
    assert rewirer.is_update_step()
    assert torch.equal(sparse.masks["weight"], mask)
    scaled_step(X)
    assert sparse.masks["weight"].tolist() == [[True, True, False, True, True, False]]
    torch.testing.assert_close(sparse.weight.data, torch.tensor([[3.8, 0.8, 0, 2.8, 0, 0]]))


class Stirring(torch.optim.SGD):
    """An optimizer whose update is dense, as an orthogonalised one is: it moves every element."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(torch.ones_like(p), alpha=-group["lr"])


def test_an_optimizer_that_moves_inactive_weights_is_noticed_and_masked_from_then_on():
    sparse = one_site([4, 1, 2, 3, 0, 0], [1, 1, 1, 1, 0, 0], update_interval=100)
    optimizer = Stirring(sparse.parameters(), lr=0.1)
    rewirer = sparse.attach(optimizer, total_steps=1000)
    with pytest.warns(FxSparseWarning, match="Stirring moved inactive weights"):
        step(sparse, optimizer)
    for _ in range(5):
        assert (sparse.weight[~sparse.masks["weight"]] == 0).all()
        step(sparse, optimizer)
    assert rewirer.step_count == 6


def test_a_warm_up_from_zero_does_not_hide_it():
    sparse = one_site([4, 1, 2, 3, 0, 0], [1, 1, 1, 1, 0, 0], update_interval=100)
    optimizer = Stirring(sparse.parameters(), lr=0.0)
    sparse.attach(optimizer, total_steps=1000)
    step(sparse, optimizer)
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.warns(FxSparseWarning, match="moved inactive weights"):
        step(sparse, optimizer)


def test_muon_is_noticed_where_torch_has_it():
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        pytest.skip("this torch has no Muon")
    sparse = fxsparse.sparsify(nn.Linear(16, 8, bias=False), torch.randn(4, 16), sparsity=0.8, update_interval=3)
    optimizer = muon(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer, total_steps=100)
    with pytest.warns(FxSparseWarning, match="Muon moved inactive weights"):
        for _ in range(8):
            optimizer.zero_grad()
            sparse(torch.randn(4, 16)).square().sum().backward()
            optimizer.step()
            assert (sparse.weight[~sparse.masks["weight"]] == 0).all()


# -- attach -------------------------------------------------------------------------------------------------


def test_attach_refuses_what_cannot_work_and_says_what_to_do():
    model = small_net()
    sparse = fxsparse.sparsify(model, torch.randn(2, 3, 8, 8))
    with pytest.raises(RuntimeStateError, match=r"build it from sparse\.parameters\(\)"):
        sparse.attach(torch.optim.SGD(model.parameters(), lr=0.1), total_steps=10)
    with pytest.raises(RuntimeStateError, match=r"lacks 2 of 3 masked weights \(3\.weight, 5\.weight\)"):
        sparse.attach(torch.optim.SGD(sparse.get_submodule("0").parameters(), lr=0.1), total_steps=10)
    with pytest.raises(RuntimeStateError, match=r"needs a torch\.optim\.Optimizer"):
        sparse.attach(object(), total_steps=10)
    with pytest.raises(fxsparse.ConfigError, match="total_steps: 0"):
        sparse.attach(torch.optim.SGD(sparse.parameters(), lr=0.1), total_steps=0)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    rewirer = sparse.attach(optimizer, total_steps=10)
    with pytest.raises(RuntimeStateError, match="already has a rewirer"):
        sparse.attach(optimizer, total_steps=10)
    rewirer.detach()
    sparse.attach(optimizer, total_steps=10)


def test_a_closure_is_refused():
    sparse = one_site([4, 1, 2, 3, 0, 0], [1, 1, 1, 1, 0, 0])
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer, total_steps=10)
    with pytest.raises(RuntimeStateError, match="closure"):
        optimizer.step(lambda: sparse(X).sum())


def test_detach_leaves_masks_and_an_ordinary_optimizer():
    sparse = one_site([4, 1, 2, 3, 0, 0], [1, 1, 1, 1, 0, 0], update_interval=1)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    rewirer = sparse.attach(optimizer, total_steps=10)
    step(sparse, optimizer)
    assert sparse.dense_gradient
    rewirer.detach()
    mask = sparse.masks["weight"].clone()
    for _ in range(3):
        step(sparse, optimizer)
    assert torch.equal(sparse.masks["weight"], mask)
    assert not sparse.dense_gradient


def test_resuming_from_state_dicts_is_bit_exact():
    def fresh():
        sparse = fxsparse.sparsify(small_net(), torch.randn(2, 3, 8, 8), "rigl", sparsity=0.8, update_interval=3)
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
        return sparse, optimizer, sparse.attach(optimizer, total_steps=40)

    def run(sparse, optimizer, start, stop):
        for t in range(start, stop):
            generator = torch.Generator().manual_seed(t)
            x, y = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(0, 5, (8,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(sparse(x), y).backward()
            optimizer.step()

    whole, whole_optimizer, whole_rewirer = fresh()
    run(whole, whole_optimizer, 0, 20)
    for stop in (3, 4, 9):  # before, on and after an update step
        first, first_optimizer, first_rewirer = fresh()
        run(first, first_optimizer, 0, stop)
        second, second_optimizer, second_rewirer = fresh()
        second.load_state_dict(first.state_dict())
        second_optimizer.load_state_dict(first_optimizer.state_dict())
        second_rewirer.load_state_dict(first_rewirer.state_dict())
        run(second, second_optimizer, stop, 20)
        for key, value in whole.state_dict().items():
            assert torch.equal(value, second.state_dict()[key]), (stop, key)
        assert second_rewirer.history == whole_rewirer.history
        assert_same_state(second_rewirer.state_dict(), whole_rewirer.state_dict())


def test_a_state_of_another_run_is_refused():
    def rewirer(method, interval):
        sparse = one_site([4, 1, 2, 3, 0, 0], [1, 1, 1, 1, 0, 0], method, update_interval=interval)
        return sparse.attach(torch.optim.SGD(sparse.parameters(), lr=0.1), total_steps=10)

    state = rewirer("rigl", 2).state_dict()
    rewirer("rigl", 2).load_state_dict(state)
    with pytest.raises(RuntimeStateError, match="method"):
        rewirer("set", 2).load_state_dict(state)
    with pytest.raises(RuntimeStateError, match="schedule"):
        rewirer("rigl", 3).load_state_dict(state)


# -- the seam for other methods -------------------------------------------------------------------------------


class MomentumGrowth(Method):
    """A method with everything that later ones need: dense gradients at every step, a moving average of its
    own, and a density that falls over time."""

    name = "momentum-growth"
    dense_gradient = Need.ALWAYS
    rewires = True
    grows = True

    def __init__(self):
        self.average = {}

    def observe(self, sites, gradients, step):
        for site, gradient in zip(sites, gradients, strict=True):
            self.average[site.name] = 0.5 * self.average.get(site.name, 0.0) + 0.5 * gradient

    def quotas(self, sites, gradients, moment):
        return [Quota(drop=2, grow=1) for _ in sites]

    def grow_score(self, site, gradient, moment):
        return self.average[site.name].abs()

    def state_dict(self):
        return {"average": dict(self.average)}

    def load_state_dict(self, state):
        self.average = dict(state["average"])


def test_a_method_of_ones_own_runs_through_the_same_runtime():
    sparse = one_site([4, 1, 2, 3, 0, 0], [1, 1, 1, 1, 0, 0], MomentumGrowth(), update_interval=2)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=1.0)
    rewirer = sparse.attach(optimizer, total_steps=8)
    step(sparse, optimizer)
    # The gradient is dense at every step, yet only active weights moved.
    torch.testing.assert_close(sparse.weight.data, torch.tensor([[3.9, 0.9, 1.9, 2.9, 0, 0]], dtype=torch.float64))
    torch.testing.assert_close(rewirer.method.average["weight"], X / 2)
    step(sparse, optimizer)
    step(sparse, optimizer)
    # Drops 0.8 and 1.8, at 1 and 2; grows 4, whose average gradient is largest.
    assert sparse.masks["weight"].tolist() == [[True, False, False, True, True, False]]
    assert sparse.active_counts == {"weight": 3}
    step(sparse, optimizer)
    torch.testing.assert_close(sparse.weight.data, torch.tensor([[3.7, 0, 0, 2.7, -5, 0]], dtype=torch.float64))


def test_planned_training_flops_follow_what_the_method_needs():
    # Update steps at t = 2 and 4 of 8: RigL costs (6 * 3 f_s + 2 (2 f_s + f_d)) / (8 * 3 f_d); f_s = f_d / 2.
    ratios = {}
    for method in ("static", "set", "rigl", MomentumGrowth()):
        sparse = one_site([4, 1, 2, 3, 0, 0], [1, 1, 1, 0, 0, 0], method, update_interval=2)
        ratios[sparse.method.name] = sparse.training_flops_ratio(8)
    assert ratios["static"] == ratios["set"] == 0.5
    assert ratios["rigl"] == pytest.approx((6 * 1.5 + 2 * 2) / 24)
    assert ratios["momentum-growth"] == pytest.approx(8 * 2 / 24)


def test_taking_over_a_pattern_clears_new_and_gone_connections_and_nothing_else():
    from fxsparse.runtime.masked_site import MaskedSite

    sparse = one_site([1, 2, 3, 4, 0, 0], [1, 1, 1, 1, 0, 0])
    optimizer = torch.optim.Adagrad(sparse.parameters(), initial_accumulator_value=7.0)
    site = MaskedSite(sparse, sparse.sites[0], target=3)
    with torch.no_grad():
        sparse.weight[0, 4] = 9.0  # stray: a new connection starts from 0 whatever was in storage
    grown = site.take_over(torch.tensor([[1, 1, 0, 0, 1, 1]]).bool(), 4, optimizer)
    assert grown.tolist() == [[False, False, False, False, True, True]]
    assert site.active == 4
    assert sparse.weight.tolist() == [[1, 2, 0, 0, 0, 0]]
    assert optimizer.state[sparse.weight]["sum"].tolist() == [[7, 7, 0, 0, 0, 0]]
    sparse.masks["weight"].fill_(True)
    assert site.active == 6  # noticed, because somebody else changed the mask


def test_an_optimizer_that_needs_a_closure_is_refused():
    sparse = one_site([4, 1, 2, 3, 0, 0], [1, 1, 1, 1, 0, 0])
    with pytest.raises(RuntimeStateError, match=r"LBFGS\.step needs a closure"):
        sparse.attach(torch.optim.LBFGS(sparse.parameters()), total_steps=10)


def test_an_update_step_without_a_gradient_is_a_skipped_one():
    sparse = one_site([4, 1, 2, 3, 0, 0], [1, 1, 1, 1, 0, 0], update_interval=1)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=1.0)
    rewirer = sparse.attach(optimizer, total_steps=10)
    step(sparse, optimizer)
    optimizer.zero_grad()
    with pytest.warns(FxSparseWarning, match="without a gradient"):
        optimizer.step()
    assert rewirer.skipped_updates == 1
    assert rewirer.history[-1].skipped == "no site had a gradient"


def test_infinite_active_weights_are_not_stray_ones():
    sparse = one_site([float("inf"), 1, 2, 3, 0, 0], [1, 1, 1, 1, 0, 0])
    optimizer = torch.optim.SGD(sparse.parameters(), lr=1.0)
    sparse.attach(optimizer, total_steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FxSparseWarning)
        step(sparse, optimizer)


@pytest.mark.parametrize("total_steps", ["5", 5.5, None])
def test_the_length_of_a_run_is_a_whole_number(total_steps):
    sparse = one_site([4, 1, 2, 3, 0, 0], [1, 1, 1, 1, 0, 0])
    with pytest.raises(fxsparse.ConfigError, match="total_steps"):
        sparse.attach(torch.optim.SGD(sparse.parameters(), lr=0.1), total_steps=total_steps)
