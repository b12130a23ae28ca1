"""The structured count of a masked graph: what the shrunk graph costs, node by node, and a count by hand."""

import pytest
import torch
import torchvision
from torch import nn

import fxsparse
from fxsparse.models.channel_nets import CHANNEL_NETS, example_of
from fxsparse.models.registry import build

LONG = {"resnet18": 64, "mobilenet_v3_small": 64, "densenet121": 64, "shufflenet_v2_x0_5": 64, "swin_t": 64}


def structured(model, x, tools):
    """A sparse module whose masks leave out all weights of half of the atoms, on both sides."""
    sparse = fxsparse.sparsify(model, x, method="static", sparsity=0.0, distribution="uniform", verify=False)
    for atom in tools.half_of(fxsparse.channel_groups(sparse)):
        for item in atom.slices:
            if item.tensor in sparse.masks:
                sparse.masks[item.tensor].index_fill_(item.dim, torch.tensor(item.indices), False)
    sparse.apply_masks_()
    return sparse


def check(sparse):
    small = sparse.compact()
    for training in (False, True):
        masked = fxsparse.count_flops(sparse, structured=True, training=training)
        compact = fxsparse.count_flops(small, training=training)
        assert masked.nodes == compact.nodes  # names, shapes, MACs, other arithmetic, gradients, parameters
        assert (masked.macs, masked.parameters) == (compact.macs, sum(p.numel() for p in small.parameters()))
    return masked


def test_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Flatten())
    model.append(nn.Linear(6 * 16, 5))
    sparse = fxsparse.sparsify(model, torch.randn(2, 3, 4, 4), method="static", sparsity=0.0, distribution="uniform")
    sparse.masks["3.weight"][:, [1, 2, 5]] = False
    sparse.masks["3.weight"][0, 0] = False  # a weight inside what is left, which a smaller layer computes with
    sparse.masks["5.weight"][:, 16 * 2 : 16 * 4] = False
    positions = 2 * 16
    report = fxsparse.count_flops(sparse, structured=True)
    assert list(report.by_node.values()) == [positions * 27 * 5, 0, 0, positions * 5 * 4, 2 * 64 * 5]
    assert report.macs == positions * (27 * 5 + 5 * 4) + 2 * 64 * 5
    assert report.parameters == (27 + 1) * 5 + 2 * 5 + (5 + 1) * 4 + 64 * 5 + 5
    assert sparse.flops().macs == positions * (27 * 8 + 5 * 6 - 1) + 2 * 64 * 5  # weight by weight


@pytest.mark.parametrize("name", CHANNEL_NETS)
def test_structured_masks_of_every_hard_network(name, tools):
    torch.manual_seed(0)
    sparse = structured(tools.randomised(CHANNEL_NETS[name](), torch.float32), example_of(name), tools)
    report = check(sparse)
    if any(not bool(mask.all()) for mask in sparse.masks.values()):
        assert report.macs < sparse.flops().dense_macs


@pytest.mark.parametrize("name", ["residual", "channel shuffle", "GLU", "attention", "cat, split, cat"])
def test_unstructured_masks(name, tools):
    torch.manual_seed(0)
    model = tools.randomised(CHANNEL_NETS[name](), torch.float32)
    sparse = fxsparse.sparsify(model, example_of(name), method="static", sparsity=0.93, distribution="uniform")
    check(sparse)


def test_both_sides_masked_the_count_by_weights_is_the_same(tools):
    """Without products of two activations, an active weight costs what a weight of the smaller layer costs."""
    sparse = structured(
        tools.randomised(build("small_resnet", in_channels=3)), torch.randn(2, 3, 16, 16).double(), tools
    )
    assert check(sparse).macs == sparse.flops().macs


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in LONG])
def test_families(name, tools):
    model = tools.randomised(torchvision.models.get_model(name, weights=None), torch.float32)
    check(structured(model, torch.randn(1, 3, LONG[name], LONG[name]), tools))


def test_what_has_no_masks_is_refused():
    model, x = nn.Linear(3, 4), torch.randn(2, 3)
    with pytest.raises(fxsparse.InputError, match="structured: Linear is not captured"):
        fxsparse.count_flops(model, x, structured=True)
    sparse = fxsparse.sparsify(nn.Sequential(model, nn.Linear(4, 2)), x, sparsity=0.5)
    with pytest.raises(fxsparse.InputError, match="leave out example_input"):
        fxsparse.count_flops(sparse, x, structured=True)
