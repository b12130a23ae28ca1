"""Training without a product in the forward pass: what keeps the zeros, what is trusted, and when somebody looks."""

import copy
from functools import partial

import pytest
import torch
from torch import nn, optim

import fxsparse
from fxsparse import apply_mask
from fxsparse.core.known_zeros import has_zeros
from fxsparse.runtime.kept_zeros import ELEMENTWISE, LOOK_EVERY

F = nn.functional


def make(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    return fxsparse.sparsify(model, torch.randn(2, 3, 8, 8), sparsity=0.8, update_interval=3, **options)


def step(sparse, optimizer, change=lambda: None):
    optimizer.zero_grad()
    sparse(torch.randn(4, 3, 8, 8)).square().mean().backward()
    change()
    optimizer.step()


def knows(sparse):
    return [has_zeros(sparse.get_parameter(site.name), sparse.masks[site.name]) for site in sparse.sites]


def is_zero(sparse):
    return all(bool((sparse.get_parameter(name)[~mask] == 0).all()) for name, mask in sparse.masks.items())


@pytest.mark.parametrize("optimizer_class", ELEMENTWISE)
@pytest.mark.parametrize("method", ["rigl", "set", "snfs", "deepr", "static"])
def test_it_is_known_at_every_step_and_true(optimizer_class, method):
    sparse = make(method=method)
    optimizer = optimizer_class(sparse.parameters(), lr=0.01, weight_decay=0.01)
    sparse.attach(optimizer, total_steps=12)
    for _ in range(12):
        step(sparse, optimizer)
        assert all(knows(sparse)) and is_zero(sparse)


@pytest.mark.parametrize("method", ["rigl", "snfs", "pruning"])
def test_training_is_bit_for_bit_what_it_is_with_the_product(method, monkeypatch):
    plain, ours = make(method=method), make(method=method)
    ends = []
    for sparse, trusts in ((plain, False), (ours, True)):
        with monkeypatch.context() as patch:
            if not trusts:
                patch.setattr("fxsparse.core.masking.has_zeros", lambda weight, mask: False)
                patch.setattr("fxsparse.core.masking._is_plain", lambda gradient: False)
            optimizer = optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
            sparse.attach(optimizer, total_steps=20)
            torch.manual_seed(1)
            for _ in range(15):
                step(sparse, optimizer)
            ends.append(sparse.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


class Noisy(optim.SGD):
    """Not an optimizer that treats every element by itself, for all that anybody knows."""


class Detached(optim.Optimizer):
    """Writes where no version counter tells."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.sub_(0.05 * parameter.grad)


@pytest.mark.parametrize("kind", [Noisy, partial(Noisy, fused=True), Detached])
def test_an_optimizer_that_is_not_known_is_not_trusted_between_looks(kind):
    sparse = make(method="static")
    optimizer = kind(sparse.parameters(), lr=0.05)
    sparse.attach(optimizer, total_steps=20)
    seen = []
    for _ in range(9):
        step(sparse, optimizer)
        seen.append(all(knows(sparse)))
    assert seen == [count in (1, 2, 4, 8) for count in range(1, 10)]


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_that_the_user_fills_at_inactive_positions_move_nothing(fused):
    """A penalty that pulls to an anchor, noise: inactive weights get no gradient."""
    sparse = make()
    optimizer = optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9, fused=fused)
    sparse.attach(optimizer, total_steps=10**6)
    weight = sparse.get_parameter("0.weight")
    for _ in range(20):
        step(sparse, optimizer, lambda: weight.grad.add_(1.0) if weight.grad is not None else None)
        assert all(knows(sparse)) and is_zero(sparse)
        for state in optimizer.state.get(weight, {}).values():
            assert (state[~sparse.masks["0.weight"]] == 0).all()


def test_a_gradient_is_known_to_be_masked_until_somebody_writes(monkeypatch):
    sparse = make(method="static")
    optimizer = optim.SGD(sparse.parameters(), lr=0.05)
    rewirer = sparse.attach(optimizer, total_steps=20)

    def masked(change):
        optimizer.zero_grad()
        sparse(torch.randn(4, 3, 8, 8)).square().mean().backward()
        change()
        return [site.has_masked_gradient() for site in rewirer._weights]

    weight = sparse.get_parameter("0.weight")
    assert masked(lambda: None) == [True, True]
    assert masked(lambda: nn.utils.clip_grad_norm_(sparse.parameters(), 1e-3)) == [False, False]
    assert masked(lambda: weight.grad.mul_(2)) == [False, True]
    assert masked(lambda: setattr(weight, "grad", torch.ones_like(weight))) == [False, True]
    assert masked(lambda: sparse(torch.randn(4, 3, 8, 8)).sum().backward()) == [False, False]  # accumulated
    assert masked(lambda: setattr(weight, "grad", None)) == [True, True]


def test_weights_that_are_written_to_behind_everybodys_back_are_noticed():
    sparse = make(method="static")
    optimizer = optim.SGD(sparse.parameters(), lr=0.05)
    sparse.attach(optimizer, total_steps=10**6)
    weight = sparse.get_parameter("0.weight")
    with pytest.warns(fxsparse.FxSparseWarning, match=r"moved inactive weights \(0.weight\)"):
        for count in range(3 * LOOK_EVERY + 1):
            late = count > 2 * LOOK_EVERY  # the last power of two before the end
            step(sparse, optimizer)
            if late:
                weight.data.add_(0.01)
            if count == 2 * LOOK_EVERY + 70:
                assert not is_zero(sparse)
        step(sparse, optimizer)
    assert is_zero(sparse)


def test_weights_that_were_perturbed_for_a_while_are_multiplied_meanwhile():
    """As sharpness-aware minimisation does."""
    sparse = make(method="static")
    optimizer = optim.SGD(sparse.parameters(), lr=0.05)
    sparse.attach(optimizer, total_steps=20)
    x = torch.randn(4, 3, 8, 8)
    expected = copy.deepcopy(sparse)
    with torch.no_grad():
        for each in (sparse, expected):
            each.get_parameter("0.weight").add_(0.5)
        expected.apply_masks_()
    assert not knows(sparse)[0]
    torch.testing.assert_close(sparse(x), expected(x), rtol=0, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_momentum_of_inactive_weights_is_looked_for_after_a_load(fused):
    sparse = make(method="static")
    optimizer = optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9, fused=fused)
    sparse.attach(optimizer, total_steps=20)
    for _ in range(5):
        step(sparse, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["momentum_buffer"] += 1.0
    optimizer.load_state_dict(state)
    step(sparse, optimizer)
    assert not is_zero(sparse) and not any(knows(sparse))


def test_a_weight_with_other_uses_than_convolutions_keeps_its_gradient_to_itself():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.shift = nn.Parameter(torch.randn(36))

        def forward(self, x):
            return F.linear(self.a(x), self.b.weight + self.shift.view(6, 6))

    torch.manual_seed(0)
    model = Shared()
    sparse = fxsparse.sparsify(model, torch.randn(2, 6), sparsity=0.5, dense=())
    own = {
        node.args[0].target: node.kwargs.get("own_gradient", False)
        for node in sparse.graph.find_nodes(op="call_function", target=apply_mask)
    }
    assert own == {"a.weight": True, "b.weight": False}
    x = torch.randn(8, 6)
    sparse(x).square().sum().backward()
    reference = copy.deepcopy(model)
    sparse.copy_to(reference)
    reference(x).square().sum().backward()
    torch.testing.assert_close(sparse.get_parameter("shift").grad, reference.shift.grad)
    for name, mask in sparse.masks.items():
        torch.testing.assert_close(sparse.get_parameter(name).grad, reference.get_parameter(name).grad * mask)


def fill(sparse):
    """As code does that has not heard of version counters."""
    for name in sparse.masks:
        sparse.get_parameter(name).data.fill_(0.1)


def is_right(sparse):
    """Whether training outputs are those of weights times masks."""
    x = torch.randn(4, 3, 8, 8)
    reference = copy.deepcopy(sparse)
    return torch.allclose(sparse(x), reference.apply_masks_() or reference(x), atol=1e-6)


def test_what_is_written_before_attach_and_after_detach_is_multiplied():
    sparse = make()
    fill(sparse)
    assert not is_zero(sparse) and is_right(sparse)
    optimizer = optim.SGD(sparse.parameters(), lr=0.05)
    rewirer = sparse.attach(optimizer, total_steps=20)
    assert is_zero(sparse) and all(knows(sparse))
    step(sparse, optimizer)
    rewirer.detach()
    fill(sparse)
    assert is_right(sparse)


def test_what_was_written_for_an_evaluation_is_multiplied_until_somebody_looked():
    sparse = make(method="static")
    optimizer = optim.SGD(sparse.parameters(), lr=0.05)
    sparse.attach(optimizer, total_steps=20)
    step(sparse, optimizer)
    sparse.eval()
    fill(sparse)
    sparse.train()
    assert is_right(sparse)
    with pytest.warns(fxsparse.FxSparseWarning, match="outside of the optimizer .* moved inactive weights"):
        step(sparse, optimizer)
    assert is_zero(sparse) and is_right(sparse)


def test_a_perturbation_by_the_dense_gradient_of_an_update_step_is_multiplied():
    """Sharpness-aware minimisation through `.data`: on update steps the gradient reaches inactive weights."""
    sparse = make()
    optimizer = optim.SGD(sparse.parameters(), lr=0.05)
    rewirer = sparse.attach(optimizer, total_steps=100)
    while not rewirer.is_update_step():
        step(sparse, optimizer)
    sparse(torch.randn(4, 3, 8, 8)).square().mean().backward()
    for parameter in sparse.parameters():
        parameter.data.add_(parameter.grad)
    assert not is_zero(sparse) and is_right(sparse)
