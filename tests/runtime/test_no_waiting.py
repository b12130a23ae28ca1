"""Update steps on tensors without values: whatever the host would have to read from a device raises there."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import fxsparse


def make(method, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))
    return fxsparse.sparsify(
        model, torch.randn(2, 3, 4, 4), method, sparsity=0.6, update_interval=1, stop_fraction=1.0, **options
    )


def move_to_fake_device(sparse, mode):
    """The module's tensors as ones of a CUDA device that have no values, and the numbers of active weights known."""
    counts = dict(sparse.active_counts)
    with mode:
        for module in sparse.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device="cuda"))
            for name, buffer in list(module._buffers.items()):
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    return counts


def know_counts(rewirer, counts):
    for site in rewirer._weights:
        mask = site.mask
        site._active, site._counted = counts[site.name], (mask, mask._version)


def run(method, optimizer=None, steps=4, **options):
    """`steps` steps, all but the first of them update steps; the rewirer."""
    sparse = make(method, **options)
    mode = FakeTensorMode()
    optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4))
    held = optimizer(sparse.parameters())
    rewirer = sparse.attach(held, total_steps=100)
    counts = move_to_fake_device(sparse, mode)
    held.param_groups[0]["params"] = list(sparse.parameters())
    know_counts(rewirer, counts)
    rewirer._zeros.look = lambda *args, **kwargs: None  # at the first steps it waits, on ordinary ones
    with mode:
        for _ in range(steps):
            for parameter in sparse.parameters():  # a backward pass asks for a real device
                parameter.grad = torch.empty_like(parameter)
            held.step()
    return rewirer


CASES = {
    "rigl": {}, "set": {}, "static": {}, "pruning": {"begin": 0, "end": 3}, "snfs": {"redistribution": "none"},
    "rigl report": {"semantics": "report"}, "rigl rigl-tf": {"semantics": "rigl-tf"},
    "rigl forbidden": {"semantics": {"regrown": "forbidden"}}, "set first": {"semantics": {"weight_update": "first"}},
    "rigl first": {"semantics": {"weight_update": "first"}},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_update_step_reads_nothing(case):
    rewirer = run(case.split()[0], **CASES[case])
    assert rewirer.step_count == 4
    assert rewirer.update_count >= (0 if case == "static" else 3)


@pytest.mark.parametrize("method", ["dsr", "rigl-sg", "snip", "deepr"])
def test_reading_would_be_seen(method):
    """Numbers of connections that depend on data have to be read."""
    with pytest.raises(DataDependentOutputException):
        run(method)
