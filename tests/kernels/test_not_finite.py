"""NaN and infinity go where a weight takes them, and nowhere else."""

import pytest
import torch
import torch.nn.functional as F
from cases import Case, random_case


def expected(case):
    """Output and gradients, sums over active weights and real pixels alone: other terms are left out, not times 0."""
    (out, _, *kernel), images = case.dense.shape, case.x.shape[0]
    real = F.unfold(torch.ones_like(case.x), kernel, case.dilation, case.padding, case.stride).bool()
    columns = F.unfold(case.x, kernel, case.dilation, case.padding, case.stride)
    where = F.unfold(
        torch.arange(1.0, case.x[0].numel() + 1, dtype=torch.float64).view(1, *case.x.shape[1:]),
        kernel, case.dilation, case.padding, case.stride,
    )[0].long() - 1  # fmt: skip
    dense, length = case.dense.reshape(out, -1), case.mask[0].numel()
    mask, dy = case.mask.reshape(out, -1), case.dy.reshape(images, out, -1)
    y = torch.zeros_like(dy)
    dx, dw = torch.zeros_like(case.x).reshape(images, -1), torch.zeros_like(dense)
    for row in range(out):
        first = row // (out // case.groups) * length
        for column in mask[row].nonzero().flatten().tolist():
            line, inside = columns[:, first + column], real[0, first + column]
            y[:, row, inside] += dense[row, column] * line[:, inside]
            dw[row, column] = (dy[:, row, inside] * line[:, inside]).sum()
            dx.index_add_(1, where[first + column][inside], dense[row, column] * dy[:, row, inside])
    y = y.reshape(case.dy.shape) + (0 if case.bias is None else case.bias[:, None, None])
    return y, dx.reshape(case.x.shape), dw.flatten()[case.pattern.indices()]


def assert_same(actual, wanted):
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(actual), kind(wanted)), kind
    finite = wanted.isfinite()
    torch.testing.assert_close(actual[finite].double(), wanted[finite].double(), rtol=1e-4, atol=1e-4)


def poison(tensor, generator, share=0.004):
    """Some elements, one at least, become NaN or infinite."""
    chosen = torch.rand(tensor.shape, generator=generator) < share
    if tensor.numel():
        chosen.view(-1)[int(torch.randint(tensor.numel(), (1,), generator=generator))] = True
    kinds = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=tensor.dtype)
    drawn = kinds[torch.randint(3, tensor.shape, generator=generator)]
    return torch.where(chosen, drawn, tensor)


@pytest.mark.parametrize("where", ["x", "dy", "both"])
def test_random_convolutions(compiled, where):
    spread = 0
    for seed in range(120):
        case, generator = random_case(seed), torch.Generator().manual_seed(seed)
        if where != "dy":
            case.x = poison(case.x, generator)
        if where != "x":
            case.dy = poison(case.dy, generator)
        y, _, dx, dw = case.computed(compiled)
        for actual, wanted in zip((y, dx, dw), expected(case), strict=True):
            assert_same(actual, wanted)
            spread += int((~wanted.isfinite()).any())
    assert spread > 100


def test_a_pixel_beside_the_last_column(compiled):
    """The left tap never reads the last pixel of a row, and padding never reads infinite gradients."""
    x, dense = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 1, 3)
    case = Case(x, dense, dense.bool(), None, [1, 1], [0, 1], [1, 1], 1, 1)
    case.dy = torch.ones(1, 1, 2, 4)
    case.x = x.clone()
    case.x[0, 0, 0, 3] = float("inf")
    dw = compiled.sparse_conv2d_weight_gradient(case.dy, case.x, case.pattern.tensors, *case.settings)
    assert dw.tolist() == [6.0, float("inf"), float("inf")]
    case.dy[0, 0, 1, 0] = float("inf")
    dw = compiled.sparse_conv2d_weight_gradient(case.dy, x, case.pattern.tensors, *case.settings)
    assert dw.tolist() == [6.0, float("inf"), float("inf")]


def test_limits_keep_nan(ops):
    x, dense = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.0]).view(4, 1, 1, 1), torch.ones(1, 1, 1, 1)
    case = Case(x, dense, dense.bool(), None, [1, 1], [0, 0], [1, 1], 1, 1)
    y = ops.sparse_conv2d_fused(x, case.values, case.pattern.tensors, None, None, *case.settings, 0.0, 6.0).flatten()
    assert y[0].isnan() and y[1:].tolist() == [6.0, 0.0, 3.0]
    for one, wanted in zip(x, y, strict=True):
        alone = ops.sparse_linear_fused(one.flatten(), case.values, case.pattern.tensors, None, 1, 1, 0.0, 6.0)
        torch.testing.assert_close(alone, wanted.view(1), equal_nan=True)


def test_linear_vectors(ops):
    """A weight that is not active does not see a NaN; one that is does."""
    mask = torch.tensor([[True, False], [False, True], [True, True], [False, False]])
    case_pattern = Case(torch.zeros(1, 2, 1, 1), mask[:, :, None, None].float(), mask[:, :, None, None], None,
                        [1, 1], [0, 0], [1, 1], 1, 1).pattern  # fmt: skip
    for x in (torch.tensor([[float("nan"), 2.0]]), torch.tensor([[float("nan"), 2.0]] * 2)):
        y = ops.sparse_linear_fused(x, torch.ones(4), case_pattern.tensors, None, 4, 1, None, None)
        for row in y:
            assert row[0].isnan() and row[2].isnan() and row[1] == 2 and row[3] == 0
