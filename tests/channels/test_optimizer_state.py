"""Training that is shrunk half-way goes on as the masked one does, with any optimizer of elementwise state."""

import copy

import pytest
import torch

import fxsparse
from fxsparse.models.channel_nets import CHANNEL_NETS, example_of
from fxsparse.passes.rewrite_channels import cut

# A gradient that is 0 but for rounding (of the keys' bias) divided by itself is noise: RMSprop has a larger eps.
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "plain SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True, eps=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
}


def structured(name, tools):
    """A sparse module whose masks leave out all weights of half of the atoms, on both sides."""
    torch.manual_seed(0)
    model = tools.randomised(CHANNEL_NETS[name]())
    x = example_of(name).double()
    sparse = fxsparse.sparsify(model, x, method="static", sparsity=0.0, distribution="uniform", verify=False)
    for atom in tools.half_of(fxsparse.channel_groups(model, x)):
        for item in atom.slices:
            if item.tensor in sparse.masks:
                sparse.masks[item.tensor].index_fill_(item.dim, torch.tensor(item.indices), False)
    sparse.apply_masks_()
    return sparse


def groups_of(module):
    """Two groups of different options."""
    parameters = list(module.parameters())
    return [{"params": parameters[::2], "lr": 0.02}, {"params": parameters[1::2]}]


def train(module, name, optimizer, steps, scheduler):
    module.train()
    for step in steps:
        optimizer.zero_grad()
        module(example_of(name, 4, seed=step).double()).square().mean().backward()
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", ["residual", "depthwise multiplier 2", "fused attention"])
def test_shrinking_half_way_changes_nothing(name, kind, tools):
    masked = structured(name, tools)
    half = copy.deepcopy(masked)
    optimizers = {module: OPTIMIZERS[kind](groups_of(module)) for module in (masked, half)}
    schedulers = {m: torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7) for m, optimizer in optimizers.items()}
    train(masked, name, optimizers[masked], range(12), schedulers[masked])
    train(half, name, optimizers[half], range(5), schedulers[half])
    large = {parameter: half.get_parameter(n).numel() for n, parameter in half.named_parameters()}
    small = half.compact(optimizers[half])
    held = [parameter for group in optimizers[half].param_groups for parameter in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in small.parameters()} and not large.keys() & set(held)
    assert sum(p.numel() for p in held) < 0.8 * sum(large.values())
    assert all(parameter in set(held) for parameter in optimizers[half].state)
    train(small, name, optimizers[half], range(5, 12), schedulers[half])
    x = example_of(name, 7, seed=9).double()
    for training in (False, True):
        tools.assert_close(tools.outputs(masked, x, training), tools.outputs(small, x, training), 1e-10)
    for key, parameter in small.named_parameters():
        whole = masked.get_parameter(key)
        torch.testing.assert_close(cut(whole, small.kept.get(key, [])), parameter, rtol=1e-6, atol=1e-7)
        for state, value in optimizers[half].state[parameter].items():
            other = optimizers[masked].state[whole][state]
            if isinstance(value, torch.Tensor) and value.ndim:
                torch.testing.assert_close(cut(other, small.kept.get(key, [])), value, rtol=1e-6, atol=1e-7)
            elif not isinstance(value, torch.Tensor) or value.numel() == 1:
                assert value == other


def test_what_cannot_be_moved_is_refused_before_anything_changes(tools):
    sparse = structured("residual", tools)
    optimizer = torch.optim.Adafactor(sparse.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    train(sparse, "residual", optimizer, range(1), scheduler)
    before = [(p, dict(optimizer.state[p])) for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(fxsparse.RuntimeStateError, match=r"row_var of \S+weight is shape"):
        sparse.compact(optimizer)
    assert [id(p) for p, _ in before] == [id(p) for p in optimizer.param_groups[0]["params"]]
    assert all(optimizer.state[p].keys() == state.keys() for p, state in before)
    with pytest.raises(fxsparse.RuntimeStateError, match="holds no parameter of this module"):
        sparse.compact(torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(fxsparse.RuntimeStateError, match=r"torch\.optim\.Optimizer"):
        sparse.compact("SGD")
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    rewirer = sparse.attach(optimizer, total_steps=10)
    with pytest.raises(fxsparse.RuntimeStateError, match=r"rewirer\.detach\(\)"):
        sparse.compact(optimizer)
    rewirer.detach()
    other = torch.nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [other]})
    sparse.compact(optimizer)
    assert optimizer.param_groups[1]["params"] == [other]
