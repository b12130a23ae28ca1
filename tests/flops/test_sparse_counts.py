"""Sparse totals against networks from which the zero weights were really removed, and against the masks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from fxsparse.flops import plan_flops


class Small(nn.Module):
    """A network with every kind of site: grouped, transposed, tied, called twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.twice = nn.Linear(6, 6)
        self.out = nn.Linear(6, 5)

    def forward(self, x):
        x = self.up(self.grouped(self.conv(x)))
        x = F.adaptive_avg_pool2d(x, (2, 1)).flatten(1)
        return self.out(self.twice(self.twice(x)))


def products_of_nonzero_weights(module, x):
    """Every non-zero weight alone, as 1, on an input of ones: each of its products is an output that is not 0."""
    ones, products = torch.ones_like(x), 0
    for index in np.argwhere(module.weight.detach().numpy() != 0):
        alone = torch.zeros_like(module.weight)
        alone[tuple(index)] = 1.0
        with torch.no_grad():
            if isinstance(module, nn.Linear):
                out = F.linear(ones, alone)
            elif isinstance(module, nn.ConvTranspose2d):
                out = F.conv_transpose2d(ones, alone, stride=module.stride)
            else:
                around = F.pad(ones, [module.padding[0]] * 4, value=1.0)  # positions on padding count
                out = F.conv2d(around, alone, stride=module.stride, groups=module.groups)
        products += int((out != 0).sum())
    return products


def test_sparse_total_is_that_of_the_weights_that_are_left():
    torch.manual_seed(0)
    x = torch.randn(2, 2, 6, 6)
    sparse = fxsparse.sparsify(Small(), x, sparsity=0.6, method="static")
    model = sparse.copy_to(Small())
    calls = []
    for module in (model.conv, model.grouped, model.up, model.twice, model.out):
        module.register_forward_hook(lambda m, args, out: calls.append((m, args[0])))
    model(x)
    assert len(calls) == 6
    expected = sum(products_of_nonzero_weights(*call) for call in calls)
    assert sparse.flops().macs == expected < sparse.flops().dense_macs
    assert fxsparse.count_flops(model, x, stored_zeros=True).macs == expected
    assert fxsparse.count_flops(sparse.fold(), stored_zeros=True).macs == expected
    assert fxsparse.count_flops(model, x).macs == sparse.flops().dense_macs


def test_removing_whole_channels_by_hand_gives_a_smaller_dense_network_of_the_same_cost():
    wide = nn.Sequential(nn.Linear(8, 10, bias=False), nn.ReLU(), nn.Linear(10, 4, bias=False))
    x = torch.randn(3, 8)
    sparse = fxsparse.sparsify(wide, x, sparsity=0.5, method="static", verify=False)
    kept = torch.tensor([0, 2, 3, 7])
    sparse.masks["0.weight"].zero_()[kept] = True
    sparse.masks["2.weight"].zero_()[:, kept] = True
    narrow = nn.Sequential(nn.Linear(8, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    assert sparse.flops().macs == fxsparse.count_flops(narrow, x).dense_macs


def test_a_masked_weight_that_also_enters_a_matrix_product():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4, bias=False)

        def forward(self, x):
            return self.layer(x) @ self.layer.weight

    sparse = fxsparse.sparsify(Tied(), torch.randn(3, 6), sparsity=0.5, method="static")
    assert sparse.active_counts == {"layer.weight": 12}
    assert sparse.flops().macs == 2 * 3 * 12


def test_categories_are_off_by_default_and_exact():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Softmax(1)
    )
    x = torch.randn(1, 1, 6, 6)
    report = fxsparse.count_flops(model, x)
    assert report.macs == 2 * 9 * 16 and report.flops == 2 * report.macs
    counted = {"bias": 32, "normalisation": 2 * 32, "activation": 32, "pooling": 4 * 8, "softmax": 5 * 8}
    assert {name: flops for name, flops in report.other.items() if flops} == counted
    assert fxsparse.count_flops(model, x, also=("bias", "softmax")).flops == report.flops + 32 + 40
    assert "counted besides, in FLOPs: bias" in report.under(also=("bias",)).table()
    with pytest.raises(fxsparse.ConfigError, match=r"also: 'biass' is not one of bias.*did you mean bias"):
        report.under(also=("biass",))


def test_training_graph_counts_auxiliary_heads():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.aux = nn.Linear(4, 2), nn.Linear(4, 3)

        def forward(self, x):
            return (self.main(x), self.aux(x)) if self.training else self.main(x)

    x = torch.randn(1, 4)
    assert fxsparse.count_flops(Heads(), x).macs == 8
    assert fxsparse.count_flops(Heads(), x, training=True).macs == 20
    sparse = fxsparse.sparsify(Heads(), x, sparsity=0.5, distribution={"*": 0.5})
    assert (sparse.flops().macs, fxsparse.count_flops(sparse, training=True).macs) == (4, 10)


def test_another_input_size_and_an_untouched_model():
    model = Small()
    sparse = fxsparse.sparsify(model, torch.randn(2, 2, 6, 6), sparsity=0.5, method="static")
    modes = [module.training for module in sparse.modules()]
    one, four = (fxsparse.count_flops(sparse, torch.randn(n, 2, 6, 6)).macs for n in (1, 4))
    assert 4 * one == four == 2 * sparse.flops().macs
    assert [module.training for module in sparse.modules()] == modes
    assert fxsparse.count_flops(sparse).by_module[""] == sparse.flops().macs


def test_memory_does_not_depend_on_the_weights():
    huge = nn.Sequential(nn.Linear(1_000_000, 1_000_000, device="meta"), nn.ReLU())  # 4 TB of weights
    x = torch.empty(2, 1_000_000, device="meta")
    assert fxsparse.count_flops(huge, x).macs == 2 * 10**12
    assert plan_flops(huge, x, sparsity=0.75, distribution={"*": 0.75}).macs == 5 * 10**11
    sparse = fxsparse.sparsify(huge, x, sparsity=0.5, distribution={"*": 0.5})
    assert sparse.flops().dense_macs == 2 * 10**12


def test_a_model_on_meta_that_makes_tensors_elsewhere():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            steps = torch.arange(x.shape[1], device="cpu").to(x.device)
            return self.layer(x) @ self.layer(x).mT + steps

    x = torch.randn(2, 3, 4)
    on_meta = fxsparse.count_flops(Positions().to("meta"), x.to("meta"))
    assert on_meta.macs == fxsparse.count_flops(Positions(), x).macs == 2 * 2 * 3 * 16 + 2 * 3 * 3 * 4


def test_the_report_of_a_sparse_module_names_the_convention():
    sparse = fxsparse.sparsify(Small(), torch.randn(2, 2, 6, 6), sparsity=0.6, method="static")
    assert "FLOPs are 2 x MACs; positions on padding count" in sparse.report()


class _AfterLinear(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x))


def test_vecdot_is_a_contraction_and_index_add_is_named():
    x = torch.randn(3, 4)
    counted = fxsparse.count_flops(_AfterLinear(lambda h: torch.linalg.vecdot(h, h)), x)
    assert counted.macs == 3 * 16 + 3 * 4
    assert not counted.unknown
    index = torch.tensor([0, 1, 0])
    counted = fxsparse.count_flops(_AfterLinear(lambda h: torch.zeros(2, 4).index_add(0, index, h)), x)
    assert counted.macs == 3 * 16
    assert any("index_add" in name for names in counted.unknown.values() for name in names)


@pytest.mark.parametrize("accumulate", [False, True])
def test_an_indexed_write_is_free_and_one_that_adds_is_named(accumulate):
    index = torch.tensor([0, 1, 0])
    model = _AfterLinear(lambda h: torch.zeros(2, 4).index_put((index,), h, accumulate=accumulate))
    counted = fxsparse.count_flops(model, torch.randn(3, 4))
    assert counted.macs == 3 * 16
    assert any("index_put" in name for names in counted.unknown.values() for name in names) is accumulate


class _Experts(torch.nn.Module):
    def __init__(self, product):
        super().__init__()
        self.product = product
        self.bank = torch.nn.Parameter(torch.randn(3, 8, 16))
        self.register_buffer("ends", torch.tensor([2, 5, 6], dtype=torch.int32))

    def forward(self, x):
        return self.product(x, self.bank, offs=self.ends)


@pytest.mark.parametrize("place", [(torch, "_grouped_mm"), (torch.nn.functional, "grouped_mm")])
def test_rows_that_go_to_experts_are_multiplied_once(place):
    product = getattr(*place, None)
    if product is None:
        pytest.skip("a function of newer versions of torch")
    model, x = _Experts(product), torch.randn(6, 8)  # 2 + 3 + 1 rows of 8 numbers, 16 results each
    report = fxsparse.count_flops(model, x)
    assert report.macs == 6 * 8 * 16 and not report.unknown
    sparse = fxsparse.sparsify(model, x, sparsity=0.5)
    assert [site.name for site in sparse.sites] == ["bank"] and sparse.flops().macs == 3 * 8 * 16


class Force(nn.Module):
    """The gradient of an energy by its input, as networks for molecules have it."""

    def __init__(self):
        super().__init__()
        self.energy, self.head = nn.Linear(6, 5), nn.Linear(6, 3)

    def forward(self, x):
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        return self.head(torch.autograd.grad(self.energy(x).tanh().sum(), x, create_graph=True)[0])


@pytest.mark.parametrize("wants_gradient", [True, False])
def test_a_backward_pass_inside_forward_is_listed_as_unknown(wants_gradient):
    x = torch.randn(4, 6, requires_grad=wants_gradient)
    sparse = fxsparse.sparsify(Force(), x, sparsity=0.5)
    assert list(sparse.flops().unknown.values()) == [("the backward pass that forward runs",)]
    assert "the backward pass that forward runs" in sparse.report()
    assert fxsparse.count_flops(Force(), x).macs == 4 * 6 * 5 + 4 * 6 * 3


def test_a_size_carries_no_parameters():
    """A scale made of the width of what a linear gave: the product reads numbers, not the linear's weight."""

    def scaled(h):
        return h * h.shape[-1] ** -0.5

    report = fxsparse.count_flops(_AfterLinear(scaled), torch.randn(2, 4))
    assert [node.parameters for node in report.nodes if node.operation == "mul"] == [0]
