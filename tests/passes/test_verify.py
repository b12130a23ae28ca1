"""Verification runs both models, sees any difference, and leaves no trace."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.passes.trace import trace
from fxsparse.passes.verify import verify

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.drop, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.fc(x))))


def pair():
    torch.manual_seed(0)
    model = Net()
    return model, fxsparse.sparsify(model, X, sparsity=0.5)


class Off(nn.Module):
    """A model that differs from another by a little, in the ways in which graphs go wrong."""

    def __init__(self, model, change, mode=None):
        super().__init__()
        self.model, self.change, self.mode = model, change, mode

    def forward(self, x):
        out = self.model(x)
        return self.change(out) if self.mode in (None, self.training) else out


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: out + 1e-7, r"output 0 differs by up to [\d.]+e-0[78]"),
        (lambda out: out.double(), "another kind of tensor as output 0"),
        (lambda out: out[:1], "another kind of tensor as output 0"),
        (lambda out: (out, out), "returns 2 values, the model 1"),
        (lambda out: (), "returns 0 values"),
        (lambda out: "text", "returns another kind of tensor"),
        (lambda out: out * torch.rand(()), "differs by up to"),
        (lambda out: out * float("nan"), "differs by up to nan"),
        (lambda out: 1 / 0, "fails in (train|eval) mode: division by zero"),
    ],
)
def test_differences_are_found_in_either_mode(change, message, mode):
    model = Net()
    name = "train" if mode else "eval"
    with pytest.raises(fxsparse.VerificationError, match=message) as info:
        verify("Net", model, Off(model, change, mode), X)
    assert "the graph of Net" in str(info.value) and f"{name} mode" in str(info.value)


@pytest.mark.parametrize(
    ("change", "other"),
    [
        (lambda out: {"a": out, "b": 1}, lambda out: {"a": out, "b": 2}),
        (lambda out: {"a": out}, lambda out: {"b": out}),
        (lambda out: (out, None), lambda out: (out, False)),
        (lambda out: [out, "x"], lambda out: [out, "y"]),
    ],
)
def test_differences_beside_tensors(change, other):
    model = Net()
    verify("Net", Off(model, change), Off(model, change), X)
    with pytest.raises(fxsparse.VerificationError):
        verify("Net", Off(model, change), Off(model, other), X)


def test_the_same_nan_is_no_difference():
    model = Net()
    verify("Net", Off(model, lambda out: out / 0 * 0), Off(model, lambda out: out / 0 * 0), X)


class Noisy(nn.Module):
    def forward(self, x):
        return x + random.random() + np.random.rand() + torch.rand(()) if self.training else x


def test_nothing_is_left_behind():
    model = nn.Sequential(Net(), Noisy()).train()
    model[0].drop.eval()
    tensors = (*model.parameters(), *model.buffers())
    state = [tensor.clone() for tensor in tensors]
    flags = [module.training for module in model.modules()]
    x = X.clone()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    twin = nn.Sequential(*model)
    assert verify("Net", model, twin, x) == []
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(tensors, state, strict=True))
    assert [module.training for module in model.modules()] == flags and twin.training
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2]) and torch.equal(x, X)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_mode_in_which_the_model_itself_fails_is_noted():
    """One row is too few for BatchNorm in train mode; the graph is captured for both modes all the same."""
    torch.manual_seed(0)
    model = Net()
    with pytest.warns(fxsparse.FxSparseWarning, match="train mode is not verified: .* more than 1 value per channel"):
        sparse = fxsparse.sparsify(model, X[:1], sparsity=0.0)
    assert any("train mode is not verified" in note for note in sparse.notes)
    for mode in (False, True):
        outputs = []
        for module in (model.train(mode), sparse.train(mode)):
            torch.manual_seed(1)
            outputs.append(module(X))
        assert torch.equal(*outputs)


def test_a_model_with_a_changed_weight_is_found():
    _, sparse = pair()
    eager = trace(Net(), X).model
    eager.load_state_dict(sparse.state_dict(), strict=False)
    verify("Net", eager, sparse, X)
    with torch.no_grad():
        weight = eager.fc.weight
        weight.view(-1)[weight.view(-1).nonzero()[0]] += 1e-3
    with pytest.raises(fxsparse.VerificationError):
        verify("Net", eager, sparse, X)


def test_verification_can_be_left_out():
    class Wrong(Net):
        def forward(self, x):
            x = self.fc(x)
            return self.head(x) if type(x) is Tensor else self.head(x.relu())

    with pytest.raises(fxsparse.VerificationError, match="the graph of Wrong in eval mode"):
        fxsparse.sparsify(Wrong(), X)
    assert len(fxsparse.sparsify(Wrong(), X, verify=False).sites) == 2


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "regnet_y_400mf", "mobilenet_v3_small"])
def test_channels_last_models_pass(name):
    """Their 1x1 and depthwise weights have strides that torch reads a memory format from."""
    import torchvision

    model = torchvision.models.get_model(name, num_classes=4).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    fxsparse.sparsify(model, x, sparsity=0.8)


def test_a_model_that_fails_on_its_example_in_both_modes_is_refused():
    with pytest.raises(fxsparse.InputError, match="Linear itself fails on example_input"):
        fxsparse.sparsify(torch.nn.Linear(4, 2), torch.randn(2, 4).double())


@pytest.mark.parametrize("model", ["a", torch.nn.Linear, None])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(fxsparse.InputError, match=r"give an instance of nn\.Module"):
        fxsparse.sparsify(model, torch.randn(2, 4))


def test_a_filter_without_active_weights_under_weight_norm_is_warned_of():
    torch.manual_seed(0)
    model = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 8))
    with pytest.warns(fxsparse.FxSparseWarning, match="the masked model gives NaN; so does weight norm"):
        fxsparse.sparsify(model, torch.randn(2, 4), sparsity=0.9)
