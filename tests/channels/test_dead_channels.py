"""What unstructured masks leave dead: removed where that is exact, kept where it is not."""

import copy

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse.models.channel_nets import CHANNEL_NETS, example_of


def chain(norm=False, padding=0, bias=True, activation=nn.ReLU):
    layers = [nn.Conv2d(3, 6, 3, padding=1), *([nn.BatchNorm2d(6)] if norm else []), activation()]
    return nn.Sequential(
        *layers, nn.Conv2d(6, 4, 3, padding=padding, bias=bias), nn.ReLU(), nn.Flatten(1), head(padding)
    )


def head(padding):
    return nn.Linear(4 * (8 if padding else 6) ** 2, 5)


def sparse_of(model, x, **masked):
    """A sparse module in which the given slices, weight name -> index, are masked."""
    sparse = fxsparse.sparsify(model, x, method="static", sparsity=0.0, distribution="uniform", verify=False)
    for name, index in masked.items():
        sparse.masks[name.replace("__", ".")][index] = False
    sparse.apply_masks_()
    return sparse


def image():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def same(sparse, small, tools, tolerance=1e-10):
    for training in (False, True):
        for batch in (1, 2, 7):
            x = torch.randn(batch, 3, 8, 8, dtype=torch.float64)
            tools.assert_close(tools.outputs(sparse, x, training), tools.outputs(small, x, training), tolerance)


def test_a_channel_that_nothing_reads_goes_with_its_filter(tools):
    x = image()
    sparse = sparse_of(tools.randomised(chain(norm=True, padding=1)), x, **{"3.weight": (slice(None), [1, 4])})
    small = sparse.compact()
    assert small.get_parameter("0.weight").shape == (4, 3, 3, 3) and small.get_parameter("3.weight").shape[1] == 4
    assert small.get_submodule("1").num_features == small.get_submodule("0").out_channels == 4
    same(sparse, small, tools)


def test_what_only_dead_channels_read_is_dead_too(tools):
    model = tools.randomised(nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.Tanh())]))
    x = torch.randn(2, 8, dtype=torch.float64)
    sparse = sparse_of(model, x, **{"4.weight": (slice(1, None), [2, 3, 5])} | {"6.weight": (slice(None), [0])})
    small = sparse.compact()
    # Channel 0 of layer 4 is unread; only it read channels 2, 3 and 5 of layer 2.
    assert [tuple(small.get_parameter(f"{i}.weight").shape) for i in (0, 2, 4, 6)] == [(8, 8), (5, 8), (7, 5), (8, 7)]
    tools.assert_close(tools.outputs(sparse, x), tools.outputs(small, x), 1e-10)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.GELU])
def test_a_filter_without_input_is_folded_into_the_bias(activation, tools):
    sparse = sparse_of(tools.randomised(chain(activation=activation)), image(), **{"0.weight": [0, 2, 5]})
    small = sparse.compact()
    assert small.get_parameter("0.weight").shape[0] == 3
    assert not torch.equal(small.get_parameter("2.bias"), sparse.get_parameter("2.bias"))
    same(sparse, small, tools)


class AddedInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3)
        self.last = nn.Conv2d(6, 4, 3)

    def forward(self, x):
        y = self.a(x)
        y += self.b(x).relu()
        return self.last(y)


def test_a_constant_is_added_in_place_to_what_is_none(tools):
    sparse = sparse_of(tools.randomised(AddedInPlace()), image(), b__weight=[0, 2], a__weight=[2, 3])
    small = sparse.compact()
    assert small.get_parameter("last.weight").shape[1] == 5  # channel 2 alone is constant in both
    same(sparse, small, tools)


def test_zeros_go_without_a_bias_and_through_padding(tools):
    model = tools.randomised(chain(padding=1, bias=False))
    with torch.no_grad():
        model[0].bias[[0, 2]] = 0.0  # relu makes 0 of it
        model[0].bias[5] = -1.0
    sparse = sparse_of(model, image(), **{"0.weight": [0, 2, 5]})
    small = sparse.compact()
    assert small.get_parameter("0.weight").shape[0] == 3
    same(sparse, small, tools)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"padding": 1}, "the constant does not reach the border"),
        ({"bias": False}, "no bias to move it to"),
        ({"norm": True}, "batch statistics and running ones give another constant"),
    ],
)
def test_a_constant_that_cannot_be_moved_exactly_stays(options, why, tools):
    model = tools.randomised(chain(**options))
    with torch.no_grad():
        model[0].bias.abs_()
        if options.get("norm"):
            model[1].bias.fill_(3.0)  # positive in both modes
    sparse = sparse_of(model, image(), **{"0.weight": [0, 2, 5]})
    small = sparse.compact()
    assert small.get_parameter("0.weight").shape[0] == 6, why
    same(sparse, small, tools)


def test_batch_norm_with_the_statistics_of_a_dead_filter_is_folded(tools):
    """After training, the running mean of a dead filter is its bias: both modes give the shift."""
    model = tools.randomised(chain(norm=True))
    with torch.no_grad():
        model[1].running_mean.copy_(model[0].bias)
    sparse = sparse_of(model, image(), **{"0.weight": [0, 2, 5]})
    small = sparse.compact()
    assert small.get_parameter("0.weight").shape[0] == 3
    same(sparse, small, tools, 1e-9)


def test_a_fresh_connection_of_weight_zero_is_active(tools):
    sparse = sparse_of(tools.randomised(chain()), image())
    with torch.no_grad():
        sparse.get_parameter("2.weight")[:, 1] = 0.0  # grown just now
    assert sparse.compact().get_parameter("0.weight").shape[0] == 6
    folded = sparse.fold()
    assert fxsparse.compact(folded).get_parameter("0.weight").shape[0] == 6
    assert fxsparse.compact(folded, stored_zeros=True).get_parameter("0.weight").shape[0] == 5
    assert folded.get_parameter("0.weight").shape[0] == 6  # the argument is as it was


def test_everything_dead_but_one_channel_a_layer(tools):
    sparse = sparse_of(tools.randomised(chain(norm=True, padding=1)), image(), **{"3.weight": slice(None)})
    small = sparse.compact()
    assert small.get_parameter("0.weight").shape[0] == 1
    same(sparse, small, tools)


QUICK = ("residual", "channel shuffle", "cat, split, cat", "grouped convolution", "GLU", "attention", "tied linear")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CHANNEL_NETS]
)
def test_unstructured_masks_of_high_sparsity(name, tools):
    torch.manual_seed(0)
    model = tools.randomised(CHANNEL_NETS[name]())
    x = example_of(name).double()
    sparse = fxsparse.sparsify(model, x, method="static", sparsity=0.9, distribution="uniform", verify=False)
    small = sparse.compact()
    assert isinstance(small, fxsparse.CapturedModule) and not isinstance(small, fxsparse.SparseModule)
    for training in (False, True):
        for batch in (1, 2, 7):
            x = example_of(name, batch, seed=batch).double()
            pairs = zip(tools.outputs(sparse, x, training), tools.outputs(small, x, training), strict=True)
            assert all((one - other).abs().max() <= 1e-10 * max(1, one.abs().max()) for one, other in pairs)
    assert list(small.state_dict()) == list(model.state_dict())
    again = fxsparse.compact(small, stored_zeros=True)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in small.parameters())


def test_masks_of_ones_change_nothing(tools):
    model = tools.randomised(CHANNEL_NETS["residual"]())
    x = example_of("residual").double()
    small = fxsparse.sparsify(model, x, method="dense", verify=False).compact()
    assert all(torch.equal(value, small.state_dict()[key]) for key, value in copy.deepcopy(model).state_dict().items())
    assert all(map(torch.equal, tools.outputs(model, x), tools.outputs(small, x)))
