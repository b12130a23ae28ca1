"""Checkpoints speak of dense weights: they move freely between masked, lowered and eager models."""

import copy
import io
import itertools

import pytest
import torch

import fxsparse

from .runs import STEPS, Net, Run, assert_same_run, assert_same_state, masked


def saved(run):
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (run.sparse, run.optimizer, run.rewirer)], file)
    return file


def load(run, file, order=(0, 1, 2)):
    file.seek(0)
    states = torch.load(file)
    parts = run.sparse, run.optimizer, run.rewirer
    for index in order:
        parts[index].load_state_dict(states[index])
    run.step = states[2]["step_count"]
    return run


def goes_on(expected, run, cut):
    run.to(STEPS)
    assert run.losses == pytest.approx(expected.losses[cut:], rel=1e-9)
    for one, other in zip(expected.masks[cut:], run.masks, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert_same_state(expected.sparse.state_dict(), run.sparse.state_dict())


@pytest.mark.parametrize("cut", [1, 3, 4, 7])
@pytest.mark.parametrize("first, second", [(0, None), (None, 0), (0, 0)])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_may_change_between_both_ways(optimizer, first, second, cut):
    expected = Run(masked(), optimizer).to(STEPS)
    file = saved(Run(masked(), optimizer, first).to(cut))
    goes_on(expected, load(Run(masked(seed=5), optimizer, second), file), cut)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_states_are_loaded_in_any_order(order):
    """The masks are others than those at hand, so the optimizer's state can be picked only when they are there."""
    expected = Run(masked(), "adamw").to(STEPS)
    file = saved(Run(masked(), "adamw", lower=0).to(7))
    fresh = Run(masked(seed=5), "adamw", lower=0).to(2)
    fresh.losses, fresh.masks = [], []
    goes_on(expected, load(fresh, file, order), 7)


def test_the_optimizers_state_is_that_of_the_masked_twin():
    one, other = Run(masked(), "adamw").to(5), Run(masked(), "adamw", lower=0).to(5)
    mine, theirs = other.optimizer.state_dict(), one.optimizer.state_dict()
    assert mine["param_groups"] == theirs["param_groups"] and list(mine["state"]) == list(theirs["state"])
    for key in theirs["state"]:
        assert_same_state(theirs["state"][key], mine["state"][key])
    assert other.optimizer.state[other.sparse.get_parameter("down.weight")]["exp_avg"].dim() == 1


def test_what_was_loaded_is_forgotten_at_the_next_step():
    run = Run(masked(), "sgd", lower=0).to(2)
    load(run, saved(run), (1,))
    run.to(4)
    before = copy.deepcopy(run.optimizer.state_dict())
    run.sparse.load_state_dict(run.sparse.state_dict())
    after = run.optimizer.state_dict()
    for key in before["state"]:
        assert_same_state(before["state"][key], after["state"][key], 0)


def test_dense_models_give_and_take_weights():
    sparse = masked()
    sparse.lower(train=True, layers="all")
    torch.manual_seed(9)
    eager = Net().double()
    result = sparse.load_state_dict(eager.state_dict(), strict=False)
    assert not result.unexpected_keys and len(result.missing_keys) == len(sparse.sites)
    for name, mask in sparse.masks.items():
        expected = eager.get_parameter(name)[mask]
        assert torch.equal(sparse.get_parameter(name), expected)
    twin = sparse.copy_to(Net().double())
    x = torch.randn(3, 3, 8, 8).double()
    torch.testing.assert_close(twin.eval()(x), sparse.eval()(x))


def test_states_of_other_shapes_are_refused():
    run = Run(masked(), lower=0).to(2)
    state = run.optimizer.state_dict()
    key = next(key for key in state["state"] if state["state"][key]["momentum_buffer"].dim() == 4)
    buffer = state["state"][key]["momentum_buffer"]
    state["state"][key]["momentum_buffer"] = buffer.flatten()
    with pytest.raises(
        fxsparse.RuntimeStateError, match=r"momentum_buffer of first.weight has shape \(216,\)"
    ) as caught:
        run.optimizer.load_state_dict(state)
    assert "\n" not in str(caught.value)
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(ValueError, match="parameter group"):
        run.optimizer.load_state_dict(other.state_dict())


def test_a_detached_optimizer_speaks_of_what_it_holds():
    run = Run(masked(), lower=0).to(2)
    run.rewirer.detach()
    shapes = {v["momentum_buffer"].dim() for v in run.optimizer.state_dict()["state"].values()}
    assert shapes == {1}


def test_assigned_and_raised():
    expected, found = Run(masked()).to(STEPS), Run(masked(), lower=0).to(5)
    load(found, saved(found), (1, 0))
    found.sparse.raise_()
    found.to(STEPS)
    assert_same_run(expected, found)
