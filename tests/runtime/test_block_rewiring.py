"""One rewiring of blocks, with numbers worked out by hand; and laws on layers that hypothesis makes up."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxsparse


def column(weights, masked, gradient, **options):
    """A linear of one input: its weight is a column of outputs, and its gradient what is given, at input 1."""
    rows = len(weights)
    model = nn.Linear(1, rows, bias=False, dtype=torch.float64)
    settings = {"distribution": {"weight": 0.5}, "decay": "constant", "drop_fraction": 0.5, "update_interval": 1}
    x = torch.ones(1, 1, dtype=torch.float64)
    sparse = fxsparse.sparsify(model, x, "rigl", granularity=(2, 1), **(settings | options))
    with torch.no_grad():
        sparse.weight.copy_(torch.tensor(weights, dtype=torch.float64)[:, None])
        sparse.masks["weight"].copy_(torch.tensor(masked).bool()[:, None])
    sparse.apply_masks_()
    optimizer = torch.optim.SGD(sparse.parameters(), lr=1.0, momentum=0.5)
    rewirer = sparse.attach(optimizer, 100)
    gradient = torch.tensor([gradient], dtype=torch.float64)

    def step():
        optimizer.zero_grad()
        (sparse(x) * gradient).sum().backward()
        optimizer.step()

    return sparse, optimizer, rewirer, step


def test_one_rewiring_by_hand():
    # Blocks of two: (8, 2) mean 5, (3, -3) mean 3, (0, 4) mean 2, then two that are inactive, and a last one of one
    # weight, 2.9. One ordinary step moves active weights by their gradient 0.
    weights = [8, 2, 3, -3, 0, 4, 0, 0, 0, 0, 2.9]
    mask = [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1]
    gradient = [0, 0, 0, 0, 0, 0, -6, 1, 4, 4, 0]
    sparse, optimizer, rewirer, step = column(weights, mask, gradient)
    step()
    torch.testing.assert_close(sparse.weight.flatten().tolist(), [float(w) for w in weights])
    assert rewirer.is_update_step()
    # k = floor(0.5 * 4 blocks) = 2 drops the means 2 and 2.9, although the last block has the smaller sum; then the
    # mean gradient 4 beats the mean 3.5 of (-6, 1); both grow.
    step()
    assert sparse.masks["weight"].flatten().int().tolist() == [1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0]
    assert sparse.weight.flatten().tolist() == [8, 2, 3, -3, 0, 0, 0, 0, 0, 0, 0]
    (record,) = rewirer.history
    assert record.changed == {"weight": 4}  # weights
    assert record.active == {"weight": 8}  # of 7: a full block for the one of a single weight
    assert record.grown_gradient_norm["weight"] == pytest.approx((36 + 1 + 16 + 16) ** 0.5)
    # The new ones start from rest: 0 - 1.0 * gradient.
    step_state = optimizer.state[sparse.weight]["momentum_buffer"].flatten().tolist()
    assert step_state == [0.0] * 11


def test_the_mean_counts_not_the_sum():
    # The last block has one weight: 3 is more than the mean (2, 2), and less than its sum.
    sparse, _, _, step = column([2, 2, 0, 0, 3], [1, 1, 0, 0, 1], [0, 0, 9, 9, 0])
    step()
    step()  # k = 1
    assert sparse.masks["weight"].flatten().int().tolist() == [0, 0, 1, 1, 1]


def test_ties_go_by_the_block():
    # All magnitudes alike: the last active block is dropped. All gradients alike: the first free block grows.
    sparse, _, _, step = column([0, 0, 1, -1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0], [5, -5, 0, 0, 5, 5, 5, 5])
    with torch.no_grad():
        sparse.weight[4:6] = torch.tensor([[1.0], [1.0]])
    step()
    sparse.weight.data[2:6] = torch.tensor([[1.0], [-1.0], [1.0], [1.0]])
    step()  # k = 1 of two blocks
    assert sparse.masks["weight"].flatten().int().tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_a_block_that_grows_straight_back_is_untouched():
    sparse, optimizer, rewirer, step = column([4, 4, 1, 2, 0, 0], [1, 1, 1, 1, 0, 0], [0.5, 0.5, 0.5, 0.25, 0, 0])
    step()
    before = sparse.weight.clone()
    momentum = optimizer.state[sparse.weight]["momentum_buffer"].clone()
    step()
    assert torch.equal(sparse.weight, before)
    assert torch.equal(optimizer.state[sparse.weight]["momentum_buffer"], momentum)
    assert rewirer.history[0].changed == {"weight": 0}


class Layers(nn.Module):
    """Linears and convolutions side by side, each on as much of the input as it takes."""

    def __init__(self, shapes):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(s[1], s[0]) if len(s) == 2 else nn.Conv2d(s[1], s[0], s[2], groups=s[3]) for s in shapes
        )

    def forward(self, x):
        results = []
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                results.append(layer(x[:, 0, 0, : layer.in_features]).sum(1))
            else:
                results.append(layer(x[:, : layer.in_channels]).flatten(1).sum(1))
        return sum(result.square() for result in results)


@st.composite
def layer_sets(draw):
    shapes = []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            shapes.append((draw(st.integers(1, 9)), draw(st.integers(1, 5))))
        else:
            groups = draw(st.integers(1, 2))
            shapes.append(
                (groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 2)), draw(st.integers(1, 2)), groups)
            )
    return shapes, [draw(st.floats(0.0, 0.97)) for _ in shapes], draw(st.integers(1, 5)), draw(st.floats(0.0, 1.0))


@pytest.mark.filterwarnings("ignore:.*about to be emptied")
@pytest.mark.parametrize("method", ["set", "rigl"])
@settings(max_examples=12, deadline=None)
@given(layer_sets())
def test_every_layer_keeps_its_number_of_whole_blocks(method, layers):
    shapes, sparsities, rows, alpha = layers
    torch.manual_seed(0)
    names = [f"layers.{i}.weight" for i in range(len(shapes))]
    sparse = fxsparse.sparsify(
        Layers(shapes),
        torch.randn(2, 5, 3, 5),
        method,
        granularity=(rows, 1),
        distribution=dict(zip(names, sparsities, strict=True)),
        drop_fraction=alpha,
        update_interval=2,
    )
    optimizer = torch.optim.Adam(sparse.parameters(), lr=0.01)
    sparse.attach(optimizer, 8)
    expected = []
    for shape, sparsity in zip(shapes, sparsities, strict=True):
        outputs, *others = shape if len(shape) == 2 else (shape[0], shape[1] // shape[3], shape[2], shape[2])
        groups = 1 if len(shape) == 2 else shape[3]
        columns = math.prod(others)
        number = groups * math.ceil(outputs // groups / rows) * columns
        expected.append(number - math.floor(sparsity * number + 1e-9))
    for _ in range(8):
        counted = []
        for mask, shape in zip(sparse.masks.values(), shapes, strict=True):
            groups = 1 if len(shape) == 2 else shape[3]
            blocks = [b for part in mask.chunk(groups) for b in part.split(rows)]
            assert all(torch.equal(block, block[:1].expand_as(block)) for block in blocks)
            counted.append(sum(int(block[0].sum()) for block in blocks))
        assert counted == expected
        optimizer.zero_grad()
        sparse(torch.randn(2, 5, 3, 5)).sum().backward()
        optimizer.step()
