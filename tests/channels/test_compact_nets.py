"""Shrunk networks that are hard to shrink: equal to the masked ones, in every mode, batch and precision."""

import copy

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse.channels.analysis import captured_for_channels
from fxsparse.models.channel_nets import CHANNEL_NETS, IMAGE_NETS, example_of
from fxsparse.passes.compact_channels import compact_channels
from fxsparse.passes.group_channels import label_channels
from fxsparse.passes.rewrite_channels import cut

FREE = {
    "chunk, both used": (3, 18),
    "equal split": (2, 14),
    "split([3, 5])": (2, 14),
    "channel shuffle": (3, 20),
    "channels last": (3, 26),
    "cat of two flattens": (2, 11),
    "baked view": (2, 18),
    "computed view": (1, 6),
    "depthwise multiplier 2": (2, 12),
    "GLU": (2, 14),
    "pixel shuffle": (2, 14),
    "x[:, :4]": (2, 14),
    "functional convs": (1, 8),
    "weight norm": (1, 6),
    "residual onto the input": (2, 16),
    "residual": (2, 14),
    "U-Net": (4, 28),
    "grouped transposed convolution": (3, 13),
    "grouped convolution": (2, 5),
    "cat, split, cat": (5, 22),
    "cat along the batch": (2, 14),
    "cat along space": (2, 14),
    "GroupNorm after cat": (3, 8),
    "conv at two resolutions": (2, 14),
    "gates": (2, 12),
    "channel mean": (2, 6),
    "layer scale": (2, 14),
    "padded shortcut": (3, 14),
    "unknown operation": (1, 6),
    "sequential": (2, 14),
    "image tokens": (2, 12),
    "unbind": (2, 10),
    "roll": (2, 14),
    "tied linear": (1, 8),
    "tied and transposed": (0, 0),
    "attention": (2, 16),
    "fused attention": (2, 16),
    "grouped queries": (2, 14),
    "repeated keys": (2, 14),
    "rotary embedding": (2, 16),
    "nn.MultiheadAttention": (4, 31),
    "pre-norm": (2, 12),
    "convolution over time": (2, 14),
    "matrix product with a parameter": (2, 14),
}
"""Name -> groups that are not pinned, exact atoms: as one counts them reading the network."""


SAMPLE = ("channel shuffle", "cat, split, cat", "U-Net", "pixel shuffle", "grouped convolution", "attention")
SLOW_BUT_SAMPLE = [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in CHANNEL_NETS]


def made(name):
    torch.manual_seed(0)
    return CHANNEL_NETS[name]()


@pytest.mark.parametrize("name", CHANNEL_NETS)
def test_groups_and_atoms(name):
    groups = fxsparse.channel_groups(made(name), example_of(name))
    exact = sum(len(group.with_status("exact")) for group in groups.groups)
    assert (len(groups.free), exact) == FREE[name]
    assert all(group.reasons for group in groups.pinned)


@pytest.mark.parametrize("name", CHANNEL_NETS)
def test_compact_equals_masked(name, tools):
    model = tools.randomised(made(name))
    groups = fxsparse.channel_groups(model, example_of(name).double())
    atoms = tools.half_of(groups)
    small = fxsparse.compact(model, example_of(name).double(), remove=atoms)
    assert not small.notes
    assert list(small.state_dict()) == list(model.state_dict())
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    assert after < before or not atoms
    reference = tools.masked(model, atoms)
    for training in (False, True):
        for batch in (1, 2, 7):
            x = example_of(name, batch, seed=batch).double()
            tools.assert_close(tools.outputs(reference, x, training), tools.outputs(small, x, training), 1e-10)
    x = example_of(name, 2, seed=3)
    single = tools.outputs(copy.deepcopy(reference).float(), x), tools.outputs(copy.deepcopy(small).float(), x)
    tools.assert_close(*single, 1e-5)


@pytest.mark.parametrize("name", CHANNEL_NETS)
def test_masked_atoms_do_not_interfere(name, tools):
    model = tools.randomised(made(name))
    x = example_of(name).double()
    atoms = tools.half_of(fxsparse.channel_groups(model, x), seed=1)
    reference = tools.masked(model, atoms, roles=("consumer",))
    other = tools.perturbed(reference, atoms)
    for training in (False, True):
        for one, two in zip(tools.outputs(reference, x, training), tools.outputs(other, x, training), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("name", [name for name in SLOW_BUT_SAMPLE if FREE[name.values[0]][0]])
def test_the_interference_test_can_fail(name, tools):
    """With one consumer left unmasked, what the producers do comes through."""
    model = tools.randomised(made(name))
    x = example_of(name).double()
    groups = fxsparse.channel_groups(model, x)
    atom = next(atom for group in groups.free for atom in group.with_status("exact"))
    reference = tools.masked(model, [atom], roles=("consumer",))
    forgotten = atom.of("consumer")[0].tensor
    with torch.no_grad():
        reference.get_parameter(forgotten).copy_(model.get_parameter(forgotten))
    other = tools.perturbed(reference, [atom])
    (one, *_), (two, *_) = tools.outputs(reference, x), tools.outputs(other, x)
    assert (one - two).abs().max() > 1e-6


@pytest.mark.parametrize("name", SLOW_BUT_SAMPLE)
def test_all_but_one_channel_removed(name, tools):
    model = tools.randomised(made(name))
    x = example_of(name).double()
    atoms = tools.half_of(fxsparse.channel_groups(model, x), fraction=1.0)
    small = fxsparse.compact(model, x, remove=atoms)
    for training in (False, True):
        reference = tools.masked(model, atoms)
        tools.assert_close(tools.outputs(reference, x, training), tools.outputs(small, x, training), 1e-9)


@pytest.mark.parametrize("name", SLOW_BUT_SAMPLE)
def test_nothing_to_remove_changes_nothing_and_twice_is_once(name, tools):
    model = tools.randomised(made(name))
    x = example_of(name).double()
    same = fxsparse.compact(model, x)
    assert all(torch.equal(value, same.state_dict()[key]) for key, value in model.state_dict().items())
    assert all(map(torch.equal, tools.outputs(model, x), tools.outputs(same, x)))
    small = fxsparse.compact(model, x, remove=tools.half_of(fxsparse.channel_groups(model, x)))
    again = fxsparse.compact(small)
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in again.state_dict().items()}
    assert all(map(torch.equal, tools.outputs(small, x), tools.outputs(again, x)))


@pytest.mark.parametrize("name", ["residual", "channel shuffle", "cat, split, cat", "fused attention", "sequential"])
def test_gradients_and_steps_agree(name, tools):
    """After ten steps of SGD with momentum and weight decay, what is left of the masked model is the compact one."""
    model = tools.randomised(made(name))
    x = example_of(name, 4).double()
    atoms = tools.half_of(fxsparse.channel_groups(model, x))
    small = fxsparse.compact(model, x, remove=atoms).train()
    large = tools.masked(model, atoms).train()
    masks = tools.masked(ones_like(model), atoms)
    for module in (small, large):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        for step in range(10):
            optimizer.zero_grad()
            module(example_of(name, 4, seed=step).double()).square().mean().backward()
            if module is large:
                for parameter, mask in zip(large.parameters(), masks.parameters(), strict=True):
                    parameter.grad *= mask
            optimizer.step()
    tools.assert_close(tools.outputs(large, x), tools.outputs(small, x), 1e-9)


def ones_like(model):
    ones = copy.deepcopy(model)
    for parameter in ones.parameters():
        nn.init.ones_(parameter)
    return ones


def test_image_nets_take_other_sizes_of_image(tools):
    for name in ("residual", "channel shuffle", "split([3, 5])", "gates", "cat along space"):
        assert name in IMAGE_NETS
        model = tools.randomised(made(name))
        x = example_of(name).double()
        atoms = tools.half_of(fxsparse.channel_groups(model, x))
        small = fxsparse.compact(model, x, remove=atoms)
        larger = torch.randn(2, 3, 20, 16, dtype=torch.float64)
        tools.assert_close(tools.outputs(tools.masked(model, atoms), larger), tools.outputs(small, larger), 1e-10)


def test_what_is_kept_of_every_tensor_is_known(tools):
    """What an optimizer's state is cut by: the small tensors are these slices of the large ones."""
    model = tools.randomised(made("cat, split, cat"))
    x = example_of("cat, split, cat").double()
    labelled = label_channels(captured_for_channels(model, x))
    gone = torch.zeros_like(labelled.space.stays)
    gone[[atom.id for atom in tools.half_of(fxsparse.channel_groups(model, x))]] = True
    compacted = compact_channels(labelled, gone)
    for name, tensor in compacted.captured.model.state_dict().items():
        large = model.state_dict()[name]
        assert torch.equal(cut(large, compacted.kept.get(name, [None] * large.ndim)), tensor)
