"""The dimension of a parameter over output channels, against the Jacobian: which elements an output depends on."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse


class Used(nn.Module):
    """A parameter of the given shape in the given expression."""

    def __init__(self, expression, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.expression = expression

    def forward(self, x):
        return self.expression(x, self.weight)


def grouped(x, w):
    return F.conv2d(x, w, groups=2)


def transposed(x, w):
    return F.conv_transpose2d(x, w, groups=2)


# Expression, shape of the parameter, shape of the input, axis of the output's channels.
KNOWN = {
    "linear": (lambda x, w: F.linear(x, w), (4, 4), (2, 4), -1),
    "product": (lambda x, w: x @ w, (4, 4), (2, 4), -1),
    "product, not square": (lambda x, w: x @ w, (4, 6), (2, 4), -1),
    "transposed": (lambda x, w: x @ w.t(), (4, 4), (2, 4), -1),
    "transposed and scaled": (lambda x, w: x @ (w.t() * 2), (4, 4), (2, 4), -1),
    "twice transposed": (lambda x, w: F.linear(x, w.t().t()), (4, 4), (2, 4), -1),
    "linear of transposed": (lambda x, w: F.linear(x, w.mT), (4, 4), (2, 4), -1),
    "from the left": (lambda x, w: w @ x, (4, 4), (4, 2), 0),
    "a copy in order": (lambda x, w: F.linear(x, w.contiguous()), (4, 4), (2, 4), -1),
    "flattened": (lambda x, w: F.linear(x, w.view(4, -1)), (4, 2, 2), (2, 4), -1),
    "einsum": (lambda x, w: torch.einsum("bi,io->bo", x, w), (4, 4), (2, 4), -1),
    "einsum, outputs first": (lambda x, w: torch.einsum("bi,oi->bo", x, w), (4, 4), (2, 4), -1),
    "a part": (lambda x, w: F.linear(x, w.chunk(2)[0]) + F.linear(x, w.chunk(2)[1]), (8, 4), (2, 4), None),
    "convolution": (lambda x, w: F.conv2d(x, w), (4, 4, 2, 2), (1, 4, 3, 3), 1),
    "grouped convolution": (grouped, (4, 2, 2, 2), (1, 4, 3, 3), 1),
    "transposed convolution": (lambda x, w: F.conv_transpose2d(x, w), (4, 4, 2, 2), (1, 4, 3, 3), 1),
    "bank": (lambda x, w: torch.bmm(x, w), (3, 4, 4), (3, 2, 4), -1),
}


@pytest.mark.parametrize("case", KNOWN)
def test_an_output_depends_on_its_channel_alone(case):
    expression, shape, of_input, axis = KNOWN[case]
    model, x = Used(expression, *shape), torch.randn(of_input)
    (site,) = fxsparse.sparsify(model, x, "dense").sites
    assert site.output_dim is not None
    if axis is None:
        assert site.output_dim == 0
        return
    jacobian = torch.autograd.functional.jacobian(lambda w: expression(x, w), model.weight)
    axis %= jacobian.ndim - len(shape)
    by_output = (jacobian.movedim(axis, 0).flatten(1, -1 - len(shape)) != 0).any(1)  # output channel, *weight
    for channel, touched in enumerate(by_output):
        indices = touched.nonzero()[:, site.output_dim].unique().tolist()
        assert indices == [channel]


def test_groups():
    cases = [("conv", grouped, (4, 2, 2, 2), (0, 2)), ("transposed", transposed, (4, 2, 2, 2), (1, 1))]
    for _, expression, shape, expected in cases:
        (site,) = fxsparse.sparsify(Used(expression, *shape), torch.randn(1, 4, 3, 3), "dense").sites
        assert (site.output_dim, site.output_groups) == expected


def of_both(x, w):
    return x @ w + F.linear(x, w)


UNKNOWN = {
    "a copy in another order": (lambda x, w: F.linear(x, w.t().contiguous()), (4, 4)),
    "both sides": (of_both, (4, 4)),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_known_is_refused_for_blocks_alone(case):
    expression, shape = UNKNOWN[case]
    model, x = Used(expression, *shape), torch.randn(2, 4)
    (site,) = fxsparse.sparsify(model, x, "dense").sites
    assert site.output_dim is None
    with pytest.raises(fxsparse.SelectionError, match="which dimension of weight makes its output channels is not"):
        fxsparse.sparsify(model, x, "static", sparsity=0.5, granularity=(2, 1))
