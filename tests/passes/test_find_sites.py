"""Sites are parameters that some convolution or linear takes as its weight, whatever module holds them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxsparse.models.zoo import ZOO
from fxsparse.models.zoo.two_linears import net
from fxsparse.passes.find_sites import find_sites
from fxsparse.passes.trace import trace

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def found(model, example):
    sites, uncovered = find_sites(trace(model, example))
    return {site.name: site for site in sites}, {item.name: item.reason for item in uncovered}


def zoo(name):
    return found(ZOO[name].make(), ZOO[name].example())


def test_a_site_says_what_uses_it():
    sites, uncovered = zoo("functional_conv")
    kernel = sites["kernel"]
    assert kernel.shape == (4, 3, 3, 3) and kernel.numel == 108 and kernel.mask_name == "kernel_mask"
    (use,) = kernel.uses
    assert (use.mode, use.operation, use.module) == ("eval", "conv2d", "")
    assert sites["head.weight"].uses[0].module == "head" and sites["head.weight"].owner is nn.Linear
    assert uncovered == {}


@pytest.mark.parametrize(
    ("name", "operations"),
    [
        ("conv1d", {"conv1.weight": "conv1d", "conv2.weight": "conv1d", "head.weight": "linear"}),
        ("conv3d", {"conv1.weight": "conv3d", "conv2.weight": "conv3d", "head.weight": "linear"}),
        ("conv_transpose1d", {"down.weight": "conv1d", "up.weight": "conv_transpose1d"}),
        ("conv_transpose2d", {"down.weight": "conv2d", "up.weight": "conv_transpose2d"}),
        ("functional_keywords", {"kernel": "conv2d", "up": "conv_transpose2d", "readout": "linear"}),
    ],
)
def test_operations(name, operations):
    assert {key: site.operation for key, site in zoo(name)[0].items()} == operations


def test_sites_come_in_execution_order():
    sites, _ = zoo("module_containers")
    assert list(sites) == ["branches.right.weight", "branches.left.weight", "layers.1.weight", "layers.0.weight"]


def test_one_parameter_is_one_site_with_all_its_uses_and_names():
    sites, _ = zoo("tied_linear")
    assert list(sites) == ["first.weight", "head.weight"]
    assert sites["first.weight"].aliases == ("second.weight",)
    assert [use.module for use in sites["first.weight"].uses] == ["first", "second"]
    assert len(zoo("called_twice")[0]["conv.weight"].uses) == 2
    assert len(zoo("called_in_loop")[0]["block.0.weight"].uses) == 3
    assert len(zoo("tied_dilations")[0]["conv.weight"].uses) == 3
    assert zoo("aliased_module")[0]["encoder.weight"].aliases == ("blocks.0.weight",)
    steps = ZOO["unrolled_gru"].example().shape[1]
    assert max(len(site.uses) for site in zoo("unrolled_gru")[0].values()) == steps


def test_uses_in_one_mode_only():
    sites, _ = zoo("mode_switch")
    assert {name: [use.mode for use in site.uses] for name, site in sites.items()} == {
        "branch.fast.weight": ["eval"],
        "head.weight": ["eval", "train"],
        "branch.slow.weight": ["train"],
    }
    assert list(sites)[-1] == "branch.slow.weight"  # what only training uses comes last
    assert [use.mode for use in zoo("functional_conv")[0]["kernel"].uses] == ["eval"]  # one graph for both


def test_depthwise_means_one_input_channel_in_each_of_several_groups():
    assert {name: site.depthwise for name, site in zoo("depthwise_separable")[0].items()} == {
        "depthwise.weight": True,
        "pointwise.weight": False,
        "head.weight": False,
    }
    assert not any(site.depthwise for site in zoo("grouped_conv")[0].values())  # two channels a group
    sites, _ = found(nn.Sequential(nn.Conv2d(1, 4, 3)), torch.randn(2, 1, 5, 5))
    assert not sites["0.weight"].depthwise  # one input channel, one group


def test_embeddings_and_ties_to_them():
    sites, uncovered = zoo("tied_embedding")
    assert sites["embedding.weight"].tied_embedding and sites["embedding.weight"].aliases == ("head.weight",)
    assert not sites["hidden.weight"].tied_embedding and uncovered == {}
    assert zoo("arange_positions")[1] == {
        "tokens.weight": "an embedding table",
        "positions.weight": "an embedding table",
    }


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("weight_norm", {"conv.parametrizations.weight.original0": "the weight of conv2d in conv is computed from it"}),
        ("scaled_weight", {"gain": "the weight of linear in the model's forward is computed from it"}),
        ("unused", {"unused.0.weight": "not used in forward"}),
        ("positional_embedding", {"token": "enters by expand", "positions": "enters by getitem"}),
    ],
)
def test_what_is_not_covered_is_listed_with_its_reason(name, reasons):
    uncovered = {key: reason for key, reason in zoo(name)[1].items() if key != "embedding.weight"}
    assert set(uncovered) == set(reasons)
    for key, reason in reasons.items():
        assert uncovered[key].startswith(reason), uncovered[key]


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.refused is None])
def test_every_matrix_is_a_site_or_listed(name):
    model = ZOO[name].make()
    sites, uncovered = found(model, ZOO[name].example())
    assert set(sites) | set(uncovered) == {key for key, p in model.named_parameters() if p.ndim > 1}
    assert not set(sites) & set(uncovered)


def test_a_weight_that_a_kernel_hides_elsewhere_is_no_site():
    """A mask would reach one of its two uses only."""
    model = net(
        lambda self, x: self.head(self.norm(self.fc(x)[None].expand(8, -1, -1).transpose(0, 1)[:, :8])),
        lambda self: setattr(self, "norm", nn.LayerNorm((8, 8))),
    )
    model.fc.weight = model.norm.weight
    model.fc.bias = None
    sites, uncovered = found(model, X)
    assert list(sites) == ["head.weight"]
    assert uncovered["fc.weight"] == "of the normalisation LayerNorm norm"


class Passed(nn.Module):
    def forward(self, x, weight):
        return F.linear(x, weight)


def test_a_weight_handed_to_a_module_that_stays_one_call():
    model = net(lambda self, x: self.head(self.passed(x, self.own)), lambda self: setattr(self, "passed", Passed()))
    model.own = nn.Parameter(torch.randn(8, 8))
    _, uncovered = found(model, X)
    assert uncovered == {"fc.weight": "not used in forward", "own": "enters by passed in passed"}


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.data.clamp_(-1, 1),
        lambda weight: weight.detach().t()[0].zero_(),
        lambda weight: weight.detach().__setitem__(0, 0.0),
        lambda weight: torch.neg(weight.detach(), out=weight.data),
    ],
)
def test_a_weight_that_forward_changes_is_no_site(change):
    """The change would go to the masked copy of the weight and be lost."""

    def forward(self, x):
        change(self.fc.weight)
        return self.head(self.fc(x))

    sites, uncovered = found(net(forward), X)
    assert list(sites) == ["head.weight"]
    assert uncovered["fc.weight"].startswith("changed in place by")


def test_reading_a_weight_does_not_hinder_it():
    def forward(self, x):
        return self.head(self.fc(x)) + self.fc.weight.square().sum() + (x @ self.fc.weight.T)[:, :3]

    assert list(found(net(forward), X)[0]) == ["fc.weight", "head.weight"]


def test_one_dimensional_weights_are_neither():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.PReLU(8))
    sites, uncovered = found(model, X)
    assert list(sites) == ["0.weight"] and uncovered == {}


def test_frozen_weights_are_marked():
    model = net(lambda self, x: self.head(self.fc(x)))
    model.fc.requires_grad_(False)
    assert {name: site.frozen for name, site in found(model, X)[0].items()} == {"fc.weight": True, "head.weight": False}
