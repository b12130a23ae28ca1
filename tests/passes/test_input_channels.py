"""The dimension of a parameter over input channels, against the Jacobian: 2 of every 4 inputs reach an output."""

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


def transposed_in_groups(x, w):
    return F.conv_transpose2d(x, w, groups=2)


# Expression, shape of the parameter, shape of an input whose elements are the inputs, in their order.
KNOWN = {
    "linear": (lambda x, w: F.linear(x, w), (6, 8), (1, 8)),
    "product": (lambda x, w: x @ w, (8, 6), (1, 8)),
    "transposed": (lambda x, w: x @ w.t(), (6, 8), (1, 8)),
    "square": (lambda x, w: x @ w.t(), (8, 8), (1, 8)),
    "from the left": (lambda x, w: w @ x, (6, 8), (8, 1)),
    "flattened": (lambda x, w: F.linear(x, w.view(6, -1)), (6, 2, 4), (1, 8)),
    "two outputs in a row": (lambda x, w: F.linear(x, w.view(12, 4)), (6, 8), (1, 4)),
    "einsum": (lambda x, w: torch.einsum("bi,io->bo", x, w), (8, 6), (1, 8)),
    "einsum over two": (lambda x, w: torch.einsum("bhd,hdo->bo", x, w), (2, 4, 6), (1, 2, 4)),
    "convolution": (lambda x, w: F.conv2d(x, w), (6, 8, 1, 1), (1, 8, 1, 1)),
    "grouped convolution": (lambda x, w: F.conv2d(x, w, groups=2), (6, 4, 1, 1), (1, 8, 1, 1)),
    "transposed convolution": (lambda x, w: F.conv_transpose2d(x, w), (8, 6, 1, 1), (1, 8, 1, 1)),
    "the same in groups": (transposed_in_groups, (8, 3, 1, 1), (1, 8, 1, 1)),
}


@pytest.mark.parametrize("case", KNOWN)
def test_two_of_every_four_inputs_reach_an_output(case):
    expression, shape, of_input = KNOWN[case]
    torch.manual_seed(0)
    x = torch.randn(of_input)
    sparse = fxsparse.sparsify(Used(expression, *shape), x, "set", granularity="2:4")
    reached = torch.autograd.functional.jacobian(sparse, x).reshape(-1, x.numel()) != 0
    groups = reached.unflatten(1, (-1, 4)).sum(2)
    in_groups = 2 if "group" in case else 1  # of which an output sees one
    assert (groups == 2).sum() * in_groups == groups.numel()
    assert (groups == 0).sum() * in_groups == groups.numel() * (in_groups - 1)


@pytest.mark.parametrize(
    ("expression", "shape", "of_input", "reason"),
    [
        (lambda x, w: F.linear(x, w.view(12, 4)), (6, 8), 4, "its 4 input channels in a group are no multiple"),
        (lambda x, w: F.linear(x[:, :6], w[:, :6]) + F.linear(x, w[:, 6:]), (6, 16), 10, "is not known"),
        (lambda x, w: F.linear(x, w) + x @ w, (8, 8), 8, "is not known"),
    ],
)
def test_where_groups_would_cross_outputs_or_are_not_known(expression, shape, of_input, reason):
    with pytest.raises(fxsparse.SelectionError, match=reason):
        fxsparse.sparsify(Used(expression, *shape), torch.randn(1, of_input), granularity="4:8")
