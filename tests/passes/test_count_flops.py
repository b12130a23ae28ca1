"""Counts against naive loops that compute the same result: `tests/flops/naive.py`."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import fxsparse
from fxsparse.core.aten_costs import attention_macs

_spec = importlib.util.spec_from_file_location("naive", Path(__file__).parent.parent / "flops" / "naive.py")
naive = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(naive)
n = naive.numbers


class Call(nn.Module):
    """A function as a model; `weights` become parameters and are passed after the inputs."""

    def __init__(self, function, *weights):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(weights)

    def forward(self, *inputs):
        return self.function(*inputs, *self.weights)


def rand(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))


def check(model, inputs, expected, rtol=1e-3):
    """The loop computes what the model computes, and needs as many products as were counted."""
    values, products = expected
    with torch.no_grad():
        out = model.eval()(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    np.testing.assert_allclose(out.double().numpy(), values, rtol=rtol, atol=1e-4)
    report = fxsparse.count_flops(model, tuple(inputs))
    assert report.dense_macs == report.macs == products
    assert report.flops == 2 * products
    assert not report.unknown
    return report


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), rand(2, 4, 9)),
    "1d unbatched": (nn.Conv1d(4, 6, 3), rand(4, 9)),
    "2d": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), bias=False), rand(2, 3, 7, 6)),
    "2d grouped": (nn.Conv2d(4, 6, 3, groups=2), rand(2, 4, 5, 5)),
    "2d depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), rand(1, 4, 5, 5)),
    "2d dilated": (nn.Conv2d(2, 3, 3, dilation=2), rand(1, 2, 7, 7)),
    "2d unbatched": (nn.Conv2d(2, 3, 3), rand(2, 5, 5)),
    "3d": (nn.Conv3d(2, 3, 2, stride=2, padding=1), rand(1, 2, 4, 4, 4)),
    "3d unbatched": (nn.Conv3d(2, 3, 2), rand(2, 3, 3, 3)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case):
    conv, x = CONVOLUTIONS[case]
    bias = None if conv.bias is None else n(conv.bias)
    options = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
    check(conv, (x,), naive.convolution(n(x), n(conv.weight), bias, **options))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode):
    conv, x = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode), rand(1, 2, 5, 5)
    check(conv, (x,), naive.convolution(naive.padded(n(x), 1, mode), n(conv.weight), n(conv.bias)))


@pytest.mark.parametrize(("padding", "each_side"), [("same", 1), ("valid", 0)])
def test_padding_by_name(padding, each_side):
    conv, x = nn.Conv2d(2, 3, 3, padding=padding), rand(1, 2, 5, 5)
    check(conv, (x,), naive.convolution(n(x), n(conv.weight), n(conv.bias), padding=each_side))


TRANSPOSED = {
    "1d": (nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1), rand(2, 3, 5)),
    "2d": (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), rand(1, 3, 4, 4)),
    "2d grouped": (nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), rand(1, 4, 3, 3)),
    "3d": (nn.ConvTranspose3d(2, 3, 2), rand(1, 2, 3, 3, 3)),
}


@pytest.mark.parametrize("case", TRANSPOSED)
def test_transposed_convolutions(case):
    conv, x = TRANSPOSED[case]
    options = {
        "stride": conv.stride[0],
        "padding": conv.padding[0],
        "output_padding": conv.output_padding[0],
        "groups": conv.groups,
    }
    bias = None if conv.bias is None else n(conv.bias)
    check(conv, (x,), naive.transposed_convolution(n(x), n(conv.weight), bias, **options))


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5), (2, 1, 3, 5)])
def test_linear_of_any_rank(shape):
    layer, x = nn.Linear(5, 4), rand(*shape)
    check(layer, (x,), naive.linear(n(x), n(layer.weight), n(layer.bias)))


def test_functional_linear_and_conv():
    x, weight, bias = rand(2, 3, 5), rand(4, 5), rand(4)
    check(Call(F.linear, weight, bias), (x,), naive.linear(n(x), n(weight), n(bias)))
    image, kernel = rand(1, 2, 4, 4), rand(3, 2, 3, 3)
    check(Call(F.conv2d, kernel), (image,), naive.convolution(n(image), n(kernel)))


def test_bilinear():
    layer, x, y = nn.Bilinear(3, 4, 5), rand(2, 3), rand(2, 4)
    check(layer, (x, y), naive.bilinear(n(x), n(y), n(layer.weight), n(layer.bias)))


MATMULS = [
    ((3,), (3,)),
    ((2, 3), (3,)),
    ((3,), (3, 4)),
    ((2, 3), (3, 4)),
    ((5, 2, 3), (3,)),
    ((3,), (5, 3, 2)),
    ((5, 2, 3), (3, 4)),
    ((2, 3), (5, 3, 4)),
    ((5, 2, 3), (5, 3, 4)),
    ((5, 1, 2, 3), (6, 3, 4)),
]


@pytest.mark.parametrize(("left", "right"), MATMULS)
def test_matmul_in_all_broadcasting_forms(left, right):
    a, b = rand(*left), rand(*right)
    check(Call(torch.matmul), (a, b), naive.broadcast_matmul(n(a), n(b)))
    check(Call(lambda a, b: a @ b), (a, b), naive.broadcast_matmul(n(a), n(b)))


PRODUCTS = {
    "mm": (torch.mm, (2, 3), (3, 4)),
    "mv": (torch.mv, (2, 3), (3,)),
    "dot": (torch.dot, (3,), (3,)),
    "inner": (lambda a, b: torch.inner(a, b.T), (2, 3), (3, 4)),
    "bmm": (torch.bmm, (5, 2, 3), (5, 3, 4)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_matrix_products(name):
    function, left, right = PRODUCTS[name]
    a, b = rand(*left), rand(*right)
    check(Call(function), (a, b), naive.broadcast_matmul(n(a), n(b)))


ADDED = {
    "addmm": (torch.addmm, (2, 4), (2, 3), (3, 4)),
    "addmv": (torch.addmv, (2,), (2, 3), (3,)),
    "baddbmm": (torch.baddbmm, (5, 2, 4), (5, 2, 3), (5, 3, 4)),
}


@pytest.mark.parametrize("name", ADDED)
def test_products_that_are_added_to_something(name):
    function, *shapes = ADDED[name]
    c, a, b = (rand(*shape) for shape in shapes)
    values, count = naive.broadcast_matmul(n(a), n(b))
    check(Call(function), (c, a, b), (n(c) + values, count))


def test_addbmm_sums_over_the_batch():
    c, a, b = rand(2, 4), rand(5, 2, 3), rand(5, 3, 4)
    values, count = naive.broadcast_matmul(n(a), n(b))
    check(Call(torch.addbmm), (c, a, b), (n(c) + values.sum(0), count))


def test_outer_products():
    a, b = rand(3), rand(4)
    expected = naive.einsum_pair("i,j->ij", n(a), n(b))
    check(Call(torch.outer), (a, b), expected)
    check(Call(lambda a, b: a.outer(b)), (a, b), expected)
    c = rand(3, 4)
    check(Call(torch.addr), (c, a, b), (n(c) + expected[0], expected[1]))


EINSUMS = [
    ("ij,jk->ik", (2, 3), (3, 4)),
    ("bij,bjk->bik", (2, 3, 4), (2, 4, 5)),
    ("i,j->ij", (3,), (4,)),
    ("i,i->i", (3,), (3,)),
    ("i,i->", (3,), (3,)),
    ("bhid,bhjd->bhij", (1, 2, 3, 4), (1, 2, 5, 4)),
    ("abc,cd->dab", (2, 3, 4), (4, 5)),
]


@pytest.mark.parametrize(("equation", "left", "right"), EINSUMS)
def test_einsum_of_two(equation, left, right):
    a, b = rand(*left), rand(*right)
    check(Call(lambda a, b: torch.einsum(equation, a, b)), (a, b), naive.einsum_pair(equation, n(a), n(b)))


def test_einsum_of_three_is_counted_in_the_order_that_is_taken():
    a, b, c = rand(2, 3), rand(3, 4), rand(4, 5)
    first, count = naive.matrix_product(n(a), n(b))
    second, more = naive.matrix_product(first, n(c))
    model = Call(lambda a, b, c: torch.einsum("ij,jk,kl->il", a, b, c))
    with torch.backends.opt_einsum.flags(enabled=False):
        report = check(model, (a, b, c), (second, count + more))
    assert report.nodes[0].detail == "einsum of 3 operands, contracted left to right"


def test_einsum_sums_an_index_of_one_operand_first():
    a, b = rand(2, 3), rand(2, 4)
    values, count = naive.einsum_pair("i,ik->ik", n(a).sum(1), n(b))
    check(Call(lambda a, b: torch.einsum("ij,ik->ik", a, b)), (a, b), (values, count))


def test_einsum_with_ellipsis_without_output_with_lists_and_of_one():
    a, b = rand(5, 2, 3), rand(5, 3, 4)
    expected = naive.broadcast_matmul(n(a), n(b))
    check(Call(lambda a, b: torch.einsum("...ij,...jk->...ik", a, b)), (a, b), expected)
    check(Call(lambda a, b: torch.einsum("...ij, ...jk", a, b)), (a, b), expected)
    check(Call(lambda a, b: torch.einsum(a, [0, 1, 2], b, [0, 2, 3], [0, 1, 3])), (a, b), expected)
    assert fxsparse.count_flops(Call(lambda a: torch.einsum("bii->b", a)), rand(2, 3, 3)).macs == 0


@pytest.mark.parametrize("dims", [0, 1, 2, ([1, 0], [0, 1])])
def test_tensordot(dims):
    a, b = rand(2, 3, 4), rand(3, 4, 5)
    if dims == 1:
        b = rand(4, 3, 5)
    if dims == ([1, 0], [0, 1]):
        b = rand(3, 2, 5)
    equation = {0: "abc,def->abcdef", 1: "abc,cde->abde", 2: "abc,bcd->ad"}.get(dims if isinstance(dims, int) else -1)
    expected = naive.einsum_pair(equation or "abc,bad->cd", n(a), n(b))
    check(Call(lambda a, b: torch.tensordot(a, b, dims)), (a, b), expected)


ATTENTION = {
    "plain": ((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 6), {}),
    "causal": ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8), {"is_causal": True}),
    "masked": ((1, 2, 4, 8), (1, 2, 5, 8), (1, 2, 5, 8), {}),
    "grouped queries": ((1, 6, 4, 8), (1, 2, 5, 8), (1, 2, 5, 8), {"enable_gqa": True}),
}


@pytest.mark.parametrize("case", ATTENTION)
def test_scaled_dot_product_attention(case):
    *shapes, options = ATTENTION[case]
    q, k, v = (rand(*shape) for shape in shapes)
    mask = (rand(4, 5),) if case == "masked" else ()
    expected = naive.attention(n(q), n(k), n(v), *map(n, mask), causal=options.get("is_causal", False))
    model = Call(lambda q, k, v, *mask: F.scaled_dot_product_attention(q, k, v, *mask, **options))
    report = check(model, (q, k, v, *mask), expected)
    assert attention_macs(*shapes) == expected[1]  # also where the kernel at hand was a plain matrix product
    heads, length, source = shapes[0][1], shapes[0][2], shapes[1][2]
    assert report.other["softmax"] == 5 * shapes[0][0] * heads * length * source


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 10}])
def test_multihead_attention(sizes, weights):
    layer = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
    q, k, v = rand(2, 3, 8), rand(2, 5, sizes.get("kdim", 8)), rand(2, 5, sizes.get("vdim", 8))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = layer

        def forward(self, q, k, v):
            return self.attention(q, k, v, need_weights=weights)[0]

    check(Model(), (q, k, v), naive.multihead_attention(layer, n(q), n(k), n(v)))


RECURRENT = {
    "rnn": nn.RNN(3, 4),
    "gru": nn.GRU(3, 4),
    "lstm": nn.LSTM(3, 4),
    "gru, two layers, both directions": nn.GRU(3, 4, num_layers=2, bidirectional=True),
    "lstm, two layers, both directions": nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "lstm with projections": nn.LSTM(3, 5, num_layers=2, proj_size=2),
}


@pytest.mark.parametrize("case", RECURRENT)
def test_recurrent_layers(case):
    layer, x = RECURRENT[case], rand(6, 2, 3)
    check(layer, (x,), naive.recurrent(layer, n(x)))


@pytest.mark.parametrize(("cell", "gates"), [(nn.RNNCell, 1), (nn.GRUCell, 3), (nn.LSTMCell, 4)])
def test_recurrent_cells(cell, gates):
    layer, x = cell(3, 5), rand(2, 3)
    _, first = naive.matrix_product(n(x), np.zeros((3, gates * 5)))
    _, second = naive.matrix_product(np.zeros((2, 5)), np.zeros((5, gates * 5)))
    assert fxsparse.count_flops(layer, x).macs == first + second


def test_embedding_costs_nothing():
    report = fxsparse.count_flops(nn.Embedding(10, 4), torch.zeros(2, 3, dtype=torch.int64))
    assert report.macs == 0 and not report.unknown


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_convolution(modulated):
    layer = torchvision.ops.DeformConv2d(2, 3, 3, padding=1, bias=False)
    x, offset = rand(1, 2, 5, 5), rand(1, 18, 5, 5) * 0.5
    inputs = (x, offset, rand(1, 9, 5, 5).sigmoid()) if modulated else (x, offset)
    mask = n(inputs[2]) if modulated else None
    check(layer, inputs, naive.deformable_convolution(n(x), n(offset), n(layer.weight), mask, padding=1))


def _hidden(x, y):
    for _ in range(2):
        x = torch.einsum("ij,jk->ik", x, y)
    return x + torch.outer(x[:, 0], y[0])


torch.fx.wrap("_hidden")


class Scores(nn.Module):
    """No weights, so it stays one call in the graph."""

    def forward(self, x, y):
        return _hidden(x, y)


def test_wrapped_functions_and_opaque_modules_are_opened():
    a, b = rand(3, 3), rand(3, 3)
    once, count = naive.matrix_product(n(a), n(b))
    twice, more = naive.matrix_product(once, n(b))
    outer, last = naive.einsum_pair("i,j->ij", twice[:, 0], n(b)[0])
    for model in (Call(_hidden), nn.ModuleDict({"scores": Scores()})):
        if isinstance(model, nn.ModuleDict):
            scores = model["scores"]
            model = Call(lambda x, y, scores=scores: scores(x, y))
            model.scores = scores
        check(model, (a, b), (twice + outer, count + more + last))


class Wider(nn.Linear):
    """A subclass is counted like its parent."""


def test_subclasses_count_like_their_parents_and_shared_weights_count_per_call():
    layer = Wider(4, 4)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(self.layer(x))

    x = rand(3, 4)
    first, count = naive.linear(n(x), n(layer.weight), n(layer.bias))
    second, more = naive.linear(first, n(layer.weight), n(layer.bias))
    check(Twice(), (x,), (second, count + more))


@torch.library.custom_op("fxsparse_tests::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x * x * x


@cube.register_fake
def _(x):
    return torch.empty_like(x)


class Cubes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return cube(self.layer(x))  # the line that the report must name


def test_an_operation_without_a_rule_is_named_with_its_line():
    report = fxsparse.count_flops(Cubes(), rand(2, 4))
    assert report.macs == 2 * 16
    ((node, operations),) = report.unknown.items()
    assert operations == ("fxsparse_tests.cube",)
    assert "test_count_flops.py:" in report.places[node]
    assert "the line that the report must name" in report.places[node]
    assert "not counted: fxsparse_tests.cube" in report.table()


def test_a_wrong_shape_names_the_first_node_that_fails():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(6, 3))
    sparse = fxsparse.sparsify(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), rand(2, 4), verify=False, sparsity=0.5)
    with pytest.raises(fxsparse.FxSparseError, match=r"2.*\(Linear\)|in 2"):
        fxsparse.count_flops(model, rand(2, 4))
    with pytest.raises(fxsparse.InputError, match=r"linear in 0 .*\(2, 7\)"):
        fxsparse.count_flops(sparse, rand(2, 7))
