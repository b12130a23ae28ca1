"""Networks in which channels meet in a way that is easily got wrong: what goes, goes exactly; the rest stays."""

import pytest
import torch

import fxsparse
from fxsparse.core.channel_rules import NAMED, ChannelRule
from fxsparse.models.channel_nets import TRAPS, example_of

STAYS = {
    "einsum", "normalize", "norm2", "topk", "sortdefault", "inplace slice", "setitem", "iaddslice", "copyslice",
    "sized scale", "gram", "nonlocal", "lrn", "argmax", "argmax2", "eca", "grn", "mode", "maxout", "where", "mixer",
    "zeros made", "shuffle then inplace", "param view", "batchmix", "flatten all", "reg weight", "merge batch", "conv3",
}  # fmt: skip
"""Networks whose `conv` keeps all channels: they are mixed, or reach something that is not understood."""


def made(name, tools):
    torch.manual_seed(0)
    return tools.randomised(TRAPS[name]())


def check(name, tools):
    """Shrinks without half of the atoms, compares with the masked network, and looks for interference."""
    model, x = made(name, tools), example_of(name).double()
    groups = fxsparse.channel_groups(model, x)
    atoms = tools.half_of(groups)
    small = fxsparse.compact(model, x, remove=atoms)
    reference, unread = tools.masked(model, atoms), tools.masked(model, atoms, roles=("consumer",))
    other = tools.perturbed(unread, atoms)
    assert not small.notes
    for training in (False, True):
        for batch in (2, 7):
            x = example_of(name, batch, seed=batch).double()
            tools.assert_close(tools.outputs(reference, x, training), tools.outputs(small, x, training), 1e-10)
            assert all(map(torch.equal, tools.outputs(unread, x, training), tools.outputs(other, x, training)))
    return model, groups


@pytest.mark.parametrize("name", TRAPS)
def test_never_wrong(name, tools):
    model, groups = check(name, tools)
    producer = next((name for name, _ in model.named_parameters() if name.startswith("conv.weight")), None)
    if producer is not None:
        assert bool(groups.group_of(producer).with_status("exact")) == (name not in STAYS)


@pytest.mark.parametrize(
    ("name", "operation", "kind"),
    [
        ("normalize", "normalize", "elementwise"),  # as the best-known tool takes every operation that it does not know
        ("norm2", "norm", "made"),
        ("argmax2", "argmax", "made"),
        ("where", "where", "made"),
    ],
)
def test_a_wrong_rule_is_caught(name, operation, kind, tools, monkeypatch):
    """With one row of the table wrong, what is shrunk is not what is masked, or masked atoms interfere."""
    monkeypatch.setitem(NAMED, operation, ChannelRule(kind))
    with pytest.raises((AssertionError, fxsparse.InputError)):
        check(name, tools)
        raise NotCaught


class NotCaught(Exception):
    """Nothing was noticed."""
