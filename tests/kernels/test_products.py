"""The products are those of torch's dense operators on the masked weight, for every kind of convolution and input."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import Case, random_case, relative_error, wide_case

from fxsparse.kernels import SparsePattern, pooling, sparse_conv2d, sparse_linear, sparse_linear_fused


def assert_agrees(case, ops):
    for actual, expected in zip(case.computed(ops), case.expected(), strict=True):
        assert actual.shape == expected.shape and actual.dtype == case.x.dtype
        assert relative_error(actual, expected) < (1e-5 if case.x.dtype == torch.float32 else 1e-12)


def some_case(x, *, outputs=6, kernel=(3, 3), stride=(1, 1), padding=(1, 1), density=0.4, groups=1, block=1):
    generator = torch.Generator().manual_seed(3)
    shape = (outputs, x.shape[1] // groups, *kernel)
    kept = torch.rand(outputs // block, 1, *shape[1:], generator=generator) < density
    mask = kept.expand(-1, block, -1, -1, -1).reshape(shape)
    dense = torch.randn(shape, generator=generator, dtype=x.dtype) * mask
    bias = torch.randn(outputs, generator=generator, dtype=x.dtype)
    return Case(x, dense, mask, bias, list(stride), list(padding), [1, 1], groups, block)


def test_a_product_by_hand(ops):
    """Weights 2 and 3 of a 1 x 3 kernel, at its ends: 2 left + 3 right, over 1 2 3 4 with zeros around."""
    pattern = SparsePattern.of(torch.tensor([[[[True, False, True]]]]))
    assert [part.tolist() for part in pattern.tensors] == [[0, 2], [0, 2], [0, 1, 1, 2], [0, 0], [0, 1]]
    x, values = torch.tensor([[[[1.0, 2, 3, 4]]]]), torch.tensor([2.0, 3.0])
    settings = [1, 1, 1, 3], [1, 1], [0, 1], [1, 1], 1, 1
    y = ops.sparse_conv2d(x, values, pattern.tensors, torch.tensor([0.5]), *settings)
    assert y.flatten().tolist() == [6.5, 11.5, 16.5, 6.5]
    dy = torch.tensor([[[[1.0, 10, 100, 1000]]]])
    dx = ops.sparse_conv2d_input_gradient(dy, x, values, pattern.tensors, *settings)
    assert dx.flatten().tolist() == [20.0, 203.0, 2030.0, 300.0]
    dw = ops.sparse_conv2d_weight_gradient(dy, x, pattern.tensors, *settings)
    assert dw.tolist() == [10 + 200 + 3000, 2 + 30 + 400]


@pytest.mark.parametrize("part", range(4))
def test_random_convolutions(ops, part):
    for seed in range(50 * part, 50 * part + 50):
        assert_agrees(random_case(seed), ops)


@pytest.mark.parametrize("part", range(2))
def test_many_channels(ops, part):
    for seed in range(12 * part, 12 * part + 12):
        assert_agrees(wide_case(seed), ops)


def test_depthwise_strips(ops):
    """Images of more slots than a strip has, two outputs a channel, a stride."""
    for stride in ((1, 1), (2, 2)):
        x = torch.randn(2, 5, 61, 47)
        assert_agrees(some_case(x, outputs=10, groups=5, stride=stride, density=0.8), ops)


def test_a_pattern_that_is_changed_in_place_is_not_remembered(ops):
    case = some_case(torch.randn(1, 96, 14, 14), outputs=16, density=0.5)
    pattern = [part.clone() for part in case.pattern.tensors]

    def fused():
        return ops.sparse_conv2d_fused(case.x, case.values, pattern, None, None, *case.settings, None, None)

    before = fused()
    assert torch.equal(fused(), before)
    moved = (torch.arange(pattern[1].numel()) % 2).int()
    pattern[1][:] = case.pattern.columns + torch.where(case.pattern.columns % 9 == 0, moved, 0).int()
    now = torch.zeros(16, 96 * 9)
    rows = torch.repeat_interleave(torch.arange(16), pattern[0].diff().long())
    now.index_put_((rows, pattern[1].long()), case.values, accumulate=True)
    assert relative_error(fused(), F.conv2d(case.x, now.view(16, 96, 3, 3), None, padding=1)) < 1e-5
    pattern[1][3] = 96 * 9
    if ops is torch.ops.fxsparse:
        with pytest.raises(ValueError, match="columns outside"):
            fused()


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("part", ["starts", "columns"])
def test_a_pattern_with_other_contents_is_not_remembered(ops, part, in_place):
    """Two rows share the positions of one between them: `starts` say how many each has."""
    x, rows, length = torch.randn(1, 512, 14, 14), 16, 512 * 9
    settings = ([rows, 512, 3, 3], [1, 1], [1, 1], [1, 1], 1, 1)
    values = torch.randn(rows // 2 * length)

    def starts(share):
        return torch.arange(rows + 1).int() // 2 * length + torch.arange(rows + 1).int() % 2 * int(share * length)

    columns = torch.arange(length).int().repeat(rows // 2)
    pattern = [starts(0.5), columns]
    other = starts(0.2) if part == "starts" else columns // 9 * 9 + (columns + 1) % 9
    for given in (pattern, [starts(0.2), columns] if part == "starts" else [pattern[0], other]):
        if given is not pattern:
            place = pattern[0 if part == "starts" else 1]
            if in_place:
                place.copy_(other)
            else:
                place.data = other
        found = ops.sparse_conv2d_fused(x, values, pattern, None, None, *settings, None, None)
        dense = torch.zeros(rows, length)
        dense[torch.repeat_interleave(torch.arange(rows), given[0].diff().long()), given[1].long()] = values
        assert relative_error(found, F.conv2d(x, dense.view(rows, 512, 3, 3), None, padding=1)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compiled", [True, False])
def test_pooling(compiled, dtype):
    max_pool2d = torch.ops.fxsparse.max_pool2d if compiled else pooling._max_pool2d
    plane_mean = torch.ops.fxsparse.plane_mean if compiled else pooling._plane_mean
    for size in ((1, 3, 40, 37), (2, 4, 7, 9), (0, 3, 5, 5)):
        x = torch.randn(size, dtype=dtype)
        if x.numel():
            x[0, 0, 2, 3], x[-1, -1, 1, 1] = torch.nan, torch.inf
        for kernel, stride, padding in itertools.product(((3, 3), (2, 5)), ((1, 1), (2, 2), (3, 1)), ((0, 0), (1, 1))):
            expected = F.max_pool2d(x, kernel, stride, padding)
            assert torch.equal(max_pool2d(x, kernel, stride, padding).nan_to_num(9e9), expected.nan_to_num(9e9))
        mean = plane_mean(x.nan_to_num(1.0, 2.0))
        assert mean.shape == (*size[:2], 1, 1)
        torch.testing.assert_close(mean, x.nan_to_num(1.0, 2.0).mean((2, 3), keepdim=True))


@pytest.mark.parametrize("block", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear(block, dtype):
    for outputs, inputs, shape in itertools.product((8, 40), (1, 7, 300), ((), (1,), (3,), (2, 33), (0,), (2, 0))):
        mask = (torch.rand(outputs // block, 1, inputs) < 0.3).expand(-1, block, -1).reshape(outputs, inputs)
        dense, pattern = torch.randn(outputs, inputs, dtype=dtype) * mask, SparsePattern.of(mask, block=block)
        x, bias = torch.randn(*shape, inputs, dtype=dtype, requires_grad=True), torch.randn(outputs, dtype=dtype)
        values, weight = pattern.gather(dense).requires_grad_(), dense.clone().requires_grad_()
        expected = F.linear(x.double(), weight.double(), bias.double())
        actual = sparse_linear(x, values, pattern.tensors, bias, (outputs, inputs), block)
        bound = 1e-5 if dtype == torch.float32 else 1e-12
        assert relative_error(actual, expected) < bound
        fused = sparse_linear_fused(x.detach(), values.detach(), pattern.tensors, bias, outputs, block, 0.0, None)
        assert relative_error(fused, expected.relu()) < bound
        dy = torch.randn_like(actual)
        found = torch.autograd.grad(actual, (x, values), dy)
        dx, dw = torch.autograd.grad(expected, (x, weight), dy.double())
        for mine, dense_one in zip(found, (dx, pattern.gather(dw)), strict=True):
            assert relative_error(mine, dense_one) < bound


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channels first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded batch": lambda x: x[:1].expand_as(x),
    "expanded channels": lambda x: x[:, :1].expand_as(x),
    "expanded pixels": lambda x: x[..., :1].expand_as(x),
    "expanded rows": lambda x: x[:, :, :1].expand_as(x),
    "slice of pixels": lambda x: F.pad(x, (2, 3, 1, 4))[:, :, 1:-4, 2:-3],
    "every second pixel": lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, ::2, ::2],
    "every second channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every second image": lambda x: x.repeat_interleave(2, 0)[::2],
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "kernel, stride, padding", [((1, 1), (1, 1), (0, 0)), ((3, 3), (1, 1), (1, 1)), ((3, 2), (2, 1), (0, 1))]
)
def test_any_layout(ops, layout, kernel, stride, padding):
    case = some_case(LAYOUTS[layout](torch.randn(3, 4, 6, 7)), kernel=kernel, stride=stride, padding=padding)
    case.dy, case.residual = (LAYOUTS[layout](tensor) for tensor in (case.dy, case.residual))
    spread = torch.stack([case.values, case.values], 1)
    case.values = spread[:, 0]
    assert_agrees(case, ops)


@pytest.mark.parametrize("shape", [(0, 4, 6, 7), (1, 4, 1, 1), (0, 4, 1, 1)])
@pytest.mark.parametrize("kernel, padding", [((1, 1), (0, 0)), ((3, 3), (1, 1))])
def test_empty_batches_and_single_pixels(ops, shape, kernel, padding):
    assert_agrees(some_case(torch.randn(shape), kernel=kernel, padding=padding), ops)


@pytest.mark.parametrize("kernel, padding", [((1, 1), (0, 0)), ((3, 3), (1, 1))])
@pytest.mark.parametrize("gone", ["all", "a row", "a column", "a group", "all but one"])
def test_no_weights(ops, gone, kernel, padding):
    case = some_case(torch.randn(2, 4, 6, 7), kernel=kernel, padding=padding, groups=2, density=1.0)
    mask = case.mask.clone()
    {
        "all": mask,
        "a row": mask[2],
        "a column": mask[:, 1],
        "a group": mask[:3],
        "all but one": mask.view(-1)[1:],
    }[gone][...] = False
    settings = case.stride, case.padding, case.dilation, case.groups, case.block
    assert_agrees(Case(case.x, case.dense * mask, mask, case.bias, *settings), ops)


def test_no_channels_and_no_outputs(ops):
    for outputs, channels in ((4, 0), (0, 3), (0, 0)):
        pattern = SparsePattern.of(torch.ones(outputs, channels, 1, 1, dtype=torch.bool))
        settings = [outputs, channels, 1, 1], [1, 1], [0, 0], [1, 1], 1, 1
        x, bias, dy = torch.randn(2, channels, 3, 3), torch.randn(outputs), torch.randn(2, outputs, 3, 3)
        values = torch.randn(outputs * channels)
        y = ops.sparse_conv2d(x, values, pattern.tensors, bias, *settings)
        assert torch.equal(y, bias[None, :, None, None].expand(2, outputs, 3, 3))
        dx = ops.sparse_conv2d_input_gradient(dy, x, values, pattern.tensors, *settings)
        assert torch.equal(dx, torch.zeros_like(x))
        assert ops.sparse_conv2d_weight_gradient(dy, x, pattern.tensors, *settings).numel() == 0
    empty = ops.sparse_linear_fused(
        torch.randn(3, 0), torch.randn(0), SparsePattern.of(torch.ones(2, 0, dtype=torch.bool)).tensors,
        torch.tensor([1.0, 2.0]), 2, 1, None, None,
    )  # fmt: skip
    assert empty.tolist() == [[1.0, 2.0]] * 3


@pytest.mark.parametrize("block, groups", [(1, 1), (4, 2)])
def test_gradients_of_gradients(ops, block, groups):
    del ops
    case = some_case(torch.randn(2, 4, 4, 3, dtype=torch.float64), outputs=8, stride=(2, 1), block=block, groups=groups)
    inputs = [tensor.detach().requires_grad_() for tensor in (case.x, case.values, case.bias)]

    def product(x, values, bias):
        return sparse_conv2d(x, values, case.pattern.tensors, bias, *case.settings)

    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)


def test_only_wanted_gradients_are_computed(monkeypatch):
    case = some_case(torch.randn(2, 4, 5, 5))
    values = case.values.requires_grad_()
    y = sparse_conv2d(case.x, values, case.pattern.tensors, None, *case.settings)
    y.sum().backward()
    assert case.x.grad is None and values.grad.shape == values.shape


def test_autocast_computes_in_float32():
    case = some_case(torch.randn(2, 4, 5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse_conv2d(case.x.bfloat16(), case.values, case.pattern.tensors, case.bias, *case.settings)
    assert y.dtype == torch.float32 and relative_error(y, case.expected()[0]) < 0.02


@pytest.mark.parametrize("low, high", [(None, None), (0.0, None), (None, 0.5), (0.0, 6.0), (0.3, 0.3)])
def test_limits(ops, low, high):
    case = some_case(torch.randn(2, 4, 5, 5))
    args = case.x, case.values, case.pattern.tensors, case.bias, None, *case.settings
    actual = ops.sparse_conv2d_fused(*args, low, high)
    expected = case.expected()[0]
    expected = expected if low is None and high is None else expected.clamp(low, high)
    assert relative_error(actual, expected) < 1e-5
