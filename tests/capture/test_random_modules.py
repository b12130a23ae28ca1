"""Random networks: whatever some fifty operations make up, captured it equals eager, or the error names the cause."""

import copy
import dataclasses
import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import fxsparse

sys.path.insert(0, os.path.dirname(__file__))
from random_modules import FORMS, REFUSED, RETURNS, STEPS, C, Net

sys.path.pop(0)

STEP_NAMES = st.sampled_from([*sorted(STEPS), "again", "again"])
PLACES = st.integers(0, 5)
PROGRAMS = st.recursive(
    st.lists(st.tuples(STEP_NAMES, PLACES, PLACES), min_size=1, max_size=6),
    lambda inner: st.lists(st.tuples(STEP_NAMES | inner, PLACES, PLACES), min_size=1, max_size=5),
    max_leaves=8,
)
NETS = {
    "program": PROGRAMS,
    "takes": st.sampled_from(sorted(FORMS)),
    "gives": st.sampled_from(RETURNS),
    "sparsity": st.sampled_from([0.0, 0.5, 0.9]),
}
SIZES = [(3, 6, 6), (1, 6, 6), (2, 8, 6)]
"""Batches, heights and widths other than the example's."""

quick = {
    "phases": [Phase.generate, Phase.shrink],
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "database": None,
}


def test_the_programs_have_many_operations():
    assert len(STEPS) >= 40


@settings(max_examples=18, **quick)
@given(**NETS)
def test_a_random_network_equals_eager(program, takes, gives, sparsity):
    check(program, takes, gives, sparsity, "concrete")


@settings(max_examples=5, **quick)
@given(**NETS)
def test_a_random_network_equals_eager_by_export(program, takes, gives, sparsity):
    check(program, takes, gives, sparsity, "export")


@pytest.mark.slow
@settings(max_examples=int(os.environ.get("FXSPARSE_EXAMPLES", 300)), **(quick | {"derandomize": False}))
@given(**NETS, capture=st.sampled_from(["concrete", "concrete", "auto", "export"]))
def test_many_random_networks_equal_eager(program, takes, gives, sparsity, capture):
    check(program, takes, gives, sparsity, capture)


def operations(program):
    for name, _, _ in program:
        yield from operations(name) if isinstance(name, list) else [name]


def example(takes, batch=2, height=6, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(batch, C, height, width, generator=generator) for _ in range(2))
    return FORMS[takes][1](x, y)


def call(model, given):
    return model(**given) if isinstance(given, dict) else model(*given)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors(item)]
    if dataclasses.is_dataclass(value):
        return [tensor for item in vars(value).values() for tensor in tensors(item)]
    return []


def same(expected, actual):
    assert type(expected) is type(actual)
    pairs = list(zip(tensors(expected), tensors(actual), strict=True))
    assert pairs and all(torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs)


def check(program, takes, gives, sparsity, capture):
    torch.manual_seed(0)
    model: Net = FORMS[takes][0](program, takes, gives)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    refused = [REFUSED[name] for name in operations(program) if name in REFUSED]  # not in a block without weights
    options = {"distribution": "uniform", "verify": False, "capture": capture}
    try:
        sparse = fxsparse.sparsify(model, example(takes), sparsity=sparsity, **options)
    except fxsparse.CaptureError as error:
        assert any(line in str(error) for line in refused) or says_why(str(error), gives, capture), error
        return
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    eager = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in sparse.masks.items():
            eager.get_parameter(name).mul_(mask)
            sparse.get_parameter(name)[~mask] = 7.0  # what stands outside a mask has no influence
    for mode in (True, False):
        outputs = []
        for module in (eager, sparse):
            module.train(mode).zero_grad()
            torch.manual_seed(1)
            outputs.append(call(module, example(takes)))
            sum(tensor.square().sum() for tensor in tensors(outputs[-1])).backward()
        same(*outputs)
        ours, buffers = dict(sparse.named_parameters()), dict(sparse.named_buffers())
        for name, parameter in eager.named_parameters():
            gradient, own = parameter.grad, ours[name].grad
            if gradient is not None and name in sparse.masks:
                gradient = torch.where(sparse.masks[name], gradient, 0)
            assert (gradient is None) == (own is None), name
            assert gradient is None or torch.allclose(gradient, own, rtol=0, atol=0, equal_nan=True), name
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in eager.named_buffers())
    for size in SIZES:
        other = example(takes, *size, seed=1)
        try:
            expected = call(eager, other)
        except Exception:
            with pytest.raises(fxsparse.InputError):
                call(sparse, other)
            continue
        try:
            actual = call(sparse, other)
        except fxsparse.InputError as error:
            assert "capture again" in str(error)
        else:
            same(expected, actual)
    assert [key for key in sparse.state_dict() if not key.endswith("_mask")] == list(model.state_dict())
    used = {name for name, parameter in eager.named_parameters() if parameter.ndim > 1 and parameter.grad is not None}
    listed = {found.name for found in sparse.uncovered} | {site.name for site in sparse.sites}
    assert used <= listed


def says_why(message, gives, capture):
    """The refusals that are known: what `torch.export` does not hand out."""
    return capture == "export" and gives == "dataclass" and "Outcome" in message
