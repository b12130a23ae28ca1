"""The networks of the zoo, which are hard to capture: shrunk where they can be, and never wrong."""

import copy

import pytest
import torch

import fxsparse
from fxsparse.models.zoo import ZOO, call, tensors

NAMES = [name for name, case in ZOO.items() if case.refused is None]
CASES = [pytest.param(name, marks=pytest.mark.slow if at % 3 else ()) for at, name in enumerate(NAMES)]


def outputs(model, case):
    torch.manual_seed(0)
    with torch.no_grad():
        return list(tensors(call(copy.deepcopy(model), case.example())))


@pytest.mark.parametrize("name", CASES)
def test_half_of_the_channels_goes(name, tools):
    case = ZOO[name]
    torch.manual_seed(0)
    model = case.make()
    groups = fxsparse.channel_groups(model, case.example())
    atoms = tools.half_of(groups)
    small = fxsparse.compact(model, case.example(), remove=atoms)
    reference = tools.masked(model, atoms, roles=("consumer",))
    assert list(small.state_dict()) == list(model.state_dict())
    for training in (False,) if case.dropout else (False, True):
        expected = outputs(reference.train(training), case)
        actual = outputs(small.train(training), case)
        assert len(expected) == len(actual)
        for one, other in zip(expected, actual, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
