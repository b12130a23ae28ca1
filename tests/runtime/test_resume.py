"""A run that is interrupted anywhere goes on bit for bit: every method, with all that it remembers."""

import copy
import io

import pytest
import torch
from torch import nn

import fxsparse

METHODS = {
    "dense": ("dense", {}),
    "static": ("static", {}),
    "set": ("set", {}),
    "set by gradient": ("set", {"redistribution": "gradient"}),
    "rigl": ("rigl", {}),
    "rigl by magnitude": ("rigl", {"semantics": {"gradient": "magnitude", "optimizer_state": "new"}}),
    "rigl-sg": ("rigl-sg", {}),
    "rigl-sm": ("rigl-sm", {}),
    "snfs": ("snfs", {}),
    "snfs by the optimizer": ("snfs", {"momentum": "optimizer"}),
    "dsr": ("dsr", {"threshold": 0.02}),
    "deepr": ("deepr", {"noise": 0.5, "l1": 0.05}),
    "pruning": ("pruning", {}),
    "pruning globally": ("pruning", {"scope": "global"}),
    "snip": ("snip", {"batches": 5}),
    "snip globally": ("snip", {"batches": 5, "scope": "global"}),
    "report": ("rigl", {"semantics": "report"}),
    "rigl-tf": ("rigl", {"semantics": "rigl-tf"}),
}
STEPS = 14


def fresh(case):
    method, options = METHODS[case]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 6))
    sparse = fxsparse.sparsify(
        model, torch.randn(2, 2, 6, 6), method, sparsity=0.7, update_interval=3, verify=False, **options
    )
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    return sparse, optimizer, sparse.attach(optimizer, total_steps=STEPS)


def train(sparse, optimizer, start, stop):
    for t in range(start, stop):
        generator = torch.Generator().manual_seed(t)
        x, y = torch.randn(8, 2, 6, 6, generator=generator), torch.randint(0, 6, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(sparse(x), y).backward()
        optimizer.step()


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    else:
        assert a == b


@pytest.mark.filterwarnings("ignore:.*about to be emptied")
@pytest.mark.parametrize("case", METHODS)
def test_every_method_resumes_bit_for_bit(case):
    whole, whole_optimizer, whole_rewirer = fresh(case)
    saved = {}
    for stop in range(STEPS):
        if stop in (
            1,
            3,
            4,
            8,
        ):  # in the middle of SNIP's batches, on an update step, after one, between DeepR's records
            file = io.BytesIO()
            torch.save((whole.state_dict(), whole_optimizer.state_dict(), whole_rewirer.state_dict()), file)
            saved[stop] = file.getvalue()
        train(whole, whole_optimizer, stop, stop + 1)
    assert whole_rewirer.history or case in ("dense", "static")
    for stop, file in saved.items():
        module, optimizer_state, state = torch.load(io.BytesIO(file), weights_only=True)
        second, optimizer, rewirer = fresh(case)
        train(second, optimizer, 0, 2)  # whatever it was before
        second.load_state_dict(module)
        optimizer.load_state_dict(optimizer_state)
        rewirer.load_state_dict(state)
        train(second, optimizer, stop, STEPS)
        assert_equal(second.state_dict(), whole.state_dict())
        assert_equal(optimizer.state_dict()["state"], whole_optimizer.state_dict()["state"])
        assert rewirer.history == whole_rewirer.history
        assert_equal(rewirer.state_dict(), whole_rewirer.state_dict())
        assert rewirer.telemetry() == whole_rewirer.telemetry()


@pytest.mark.filterwarnings("ignore:.*about to be emptied")
@pytest.mark.parametrize("case", METHODS)
def test_a_saved_state_is_a_snapshot(case):
    sparse, optimizer, rewirer = fresh(case)
    train(sparse, optimizer, 0, 4)
    state = rewirer.state_dict()
    before = copy.deepcopy(state)
    train(sparse, optimizer, 4, 10)
    assert_equal(state, before)
    assert rewirer.state_dict()["step_count"] == 10


def test_a_state_of_other_settings_is_refused():
    state = fresh("rigl")[2].state_dict()
    for case, what in [("rigl-tf", "schedule"), ("set", "method"), ("rigl by magnitude", "semantics")]:
        with pytest.raises(fxsparse.RuntimeStateError, match=f"the saved rewirer has {what}"):
            fresh(case)[2].load_state_dict(state)
