"""Every family of torchvision and the networks of `models/`: groups as counted by hand, shrunk equal to masked."""

import copy
from fractions import Fraction

import pytest
import torch
import torchvision

import fxsparse
from fxsparse.models.registry import build

# Groups that are not pinned: a convolution or linear a group, less those that a residual or a gate joins.
GROUPS = {
    "resnet18": 12,
    "resnet50": 37,
    "densenet121": 120,
    "vgg16_bn": 15,
    "mobilenet_v2": 25,
    "squeezenet1_0": 25,
    "googlenet": 57,
    "inception_v3": 94,
    "shufflenet_v2_x1_0": 37,
    "resnext50_32x4d": 37,
    "regnet_y_400mf": 53,
    "swin_t": 28,
    "convnext_tiny": 22,
    "vit_b_16": 25,
}
QUICK_GROUPS = ("resnet18", "squeezenet1_0")

FAMILIES = {
    "alexnet": 96,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "googlenet": 64,
    "inception_v3": 299,
    "maxvit_t": 224,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_0": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11": 64,
    "vgg11_bn": 64,
    "vit_b_32": 224,
    "wide_resnet50_2": 64,
    "fcn_resnet50": 64,
    "deeplabv3_resnet50": 64,
    "deeplabv3_mobilenet_v3_large": 64,
    "lraspp_mobilenet_v3_large": 64,
}
QUICK_FAMILIES = ("shufflenet_v2_x0_5",)

OWN = {"wide_resnet22_2": 32, "resnet50_cifar": 32, "mobilenet_v1": 64, "small_resnet": 32}
QUICK_OWN = ("small_resnet",)

WITHOUT_ATTENTION = ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "densenet121", "regnet_y_400mf")


def torchvision_model(name, **options):
    torch.manual_seed(0)
    if name in ("googlenet", "inception_v3"):
        options.setdefault("init_weights", False)
    if name.startswith(("fcn", "deeplab", "lraspp")):
        options |= {"weights_backbone": None}
    return torchvision.models.get_model(name, weights=None, **options)


def _slow_but(names, quick):
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", _slow_but(GROUPS, QUICK_GROUPS))
def test_groups(name):
    options = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    size = {"inception_v3": 299, "vit_b_16": 224}.get(name, 64)
    groups = fxsparse.channel_groups(torchvision_model(name, **options), torch.randn(1, 3, size, size))
    assert len(groups.free) == GROUPS[name]
    assert len(groups.pinned) == 1  # the classes


def check(model, x, tools):
    atoms = tools.half_of(fxsparse.channel_groups(model, x))
    small = fxsparse.compact(model, x, remove=atoms)
    assert not [note for note in small.notes if "stay" in note]
    assert list(small.state_dict()) == list(model.state_dict())
    reference = tools.masked(model, atoms)
    for training in (False, True):
        for batch in (1, 2, 7) if x.shape[-1] <= 64 else (2,):
            if training and batch == 1:
                continue  # batch statistics of one value a channel
            inputs = torch.randn(batch, *x.shape[1:], dtype=torch.float64)
            tools.assert_close(
                tools.outputs(reference, inputs, training), tools.outputs(small, inputs, training), 1e-10
            )
    unread = tools.masked(model, atoms, roles=("consumer",))
    other = tools.perturbed(unread, atoms)
    for training in (False, True):
        assert all(map(torch.equal, tools.outputs(unread, x, training), tools.outputs(other, x, training)))
    single = (tools.outputs(copy.deepcopy(module).float(), x.float()) for module in (reference, small))
    tools.assert_close(*single, 1e-5)
    return atoms, small


@pytest.mark.parametrize("name", _slow_but(FAMILIES, QUICK_FAMILIES))
def test_a_family_of_torchvision(name, tools):
    model = tools.randomised(torchvision_model(name))
    size = FAMILIES[name]
    atoms, _ = check(model, torch.randn(2, 3, size, size, dtype=torch.float64), tools)
    assert len(atoms) > 500


@pytest.mark.parametrize("name", _slow_but(OWN, QUICK_OWN))
def test_a_network_of_ours(name, tools):
    torch.manual_seed(0)
    size = OWN[name]
    check(tools.randomised(build(name, in_channels=3)), torch.randn(2, 3, size, size, dtype=torch.float64), tools)


@pytest.mark.parametrize("name", _slow_but(WITHOUT_ATTENTION, WITHOUT_ATTENTION[:1]))
def test_flops_are_those_of_the_masked_graph(name, tools):
    """A weight costs its elements times their reuse, and keeps the rows and columns of the atoms that stay."""
    model = torchvision_model(name)
    x = torch.randn(1, 3, 64, 64)
    atoms = tools.half_of(fxsparse.channel_groups(model, x))
    small = fxsparse.compact(model, x, remove=atoms)
    gone = {}
    for atom in atoms:
        for item in atom.slices:
            gone.setdefault((item.tensor, item.dim), set()).update(item.indices)
    expected = 0
    for node in fxsparse.count_flops(model, x).nodes:
        kept = Fraction(1)
        for dim in (0, 1):
            kept *= 1 - Fraction(len(gone.get((node.weight, dim), ())), node.weight_shape[dim] if node.weight else 1)
        expected += node.macs * kept
    assert fxsparse.count_flops(small).macs == expected < fxsparse.count_flops(model, x).macs / 2


@pytest.mark.slow
def test_single_precision(tools):
    """Single precision, to 1e-5 relative."""
    model = tools.randomised(torchvision_model("resnet18"), torch.float32)
    x = torch.randn(2, 3, 64, 64)
    atoms = tools.half_of(fxsparse.channel_groups(model, x))
    small, reference = fxsparse.compact(model, x, remove=atoms), tools.masked(model, atoms)
    for training in (False, True):
        tools.assert_close(tools.outputs(reference, x, training), tools.outputs(small, x, training), 1e-5)
