"""Networks in which channels meet in a way that is easily got wrong: what goes, goes exactly; the rest stays."""

import pytest
import torch

import fxsparse
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


@pytest.mark.parametrize("name", TRAPS)
def test_never_wrong(name, tools):
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
    producer = next((name for name, _ in model.named_parameters() if name.startswith("conv.weight")), None)
    if producer is not None:
        assert bool(groups.group_of(producer).with_status("exact")) == (name not in STAYS)
