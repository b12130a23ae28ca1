"""Recurrent and attention layers with every weight an operand: what comes out is the eager module's, bit for bit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import rnn, spectral_norm, weight_norm

import fxsparse
from fxsparse.passes.trace import trace

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
FRAME = X[:, 0]
MASK = torch.ones(5, 5).tril().logical_not()
PADDING = torch.tensor([[False] * 5, [False, False, False, True, True]])


class Called(nn.Module):
    """A layer, called with fixed options on the tensors that it is given, or on one or two of them several times."""

    def __init__(self, layer, times=(1, 1, 1), masks=(), **options):
        super().__init__()
        self.layer, self.times, self.options = layer, times, options
        for name, mask in dict(masks).items():
            self.register_buffer(name, mask, persistent=False)
        self.masks = list(dict(masks))

    def forward(self, *args):
        args = [arg for arg, times in zip(args, self.times, strict=False) for _ in range(times)]
        return self.layer(*args, **self.options, **{name: getattr(self, name) for name in self.masks})


SELF, CROSS = (3,), (1, 2)


def state(layers, size=6, batch=(2,)):
    return torch.randn(layers, *batch, size, generator=torch.Generator().manual_seed(2))


RECURRENT = {
    "gru": (lambda: nn.GRU(8, 6), (X,)),
    "gru, batch first, from a state": (lambda: nn.GRU(8, 6, batch_first=True), (X, state(1))),
    "gru, deep, both ways, dropout": (
        lambda: nn.GRU(8, 6, num_layers=2, bidirectional=True, dropout=0.4, batch_first=True),
        (X,),
    ),
    "gru without biases, unbatched": (lambda: nn.GRU(8, 6, bias=False), (X[0],)),
    "lstm": (lambda: nn.LSTM(8, 6, batch_first=True), (X,)),
    "lstm, both ways, from states": (
        lambda: nn.LSTM(8, 6, bidirectional=True, batch_first=True),
        (X, (state(2), state(2) / 2)),
    ),
    "lstm with projections": (lambda: nn.LSTM(8, 6, num_layers=2, proj_size=3), (X,)),
    "rnn": (lambda: nn.RNN(8, 6, num_layers=2), (X,)),
    "rnn, relu": (lambda: nn.RNN(8, 6, nonlinearity="relu"), (X,)),
    "gru cell": (lambda: nn.GRUCell(8, 6), (FRAME,)),
    "lstm cell, from states": (lambda: nn.LSTMCell(8, 6), (FRAME, (state(1)[0], state(1)[0] / 2))),
    "rnn cell": (lambda: nn.RNNCell(8, 6, nonlinearity="relu"), (FRAME,)),
    "unbatched cell": (lambda: nn.LSTMCell(8, 6), (FRAME[0],)),
}


def attention(times, heads=2, masks=(), need_weights=True, average=True, causal=False, **options):
    layer = nn.MultiheadAttention(8, heads, **({"batch_first": True} | options))
    own = {"need_weights": need_weights, "average_attn_weights": average, "is_causal": causal}
    return lambda: Called(copy.deepcopy(layer), times, masks, **own)


ATTENTION = {
    "self": (attention(SELF), (X,)),
    "self, time first, no weights returned": (attention(SELF, batch_first=False, need_weights=False), (X,)),
    "cross": (attention(CROSS), (X, Y)),
    "three inputs": (attention((1, 1, 1)), (X, Y, 2 * Y)),
    "separate weights": (attention((1, 1, 1), kdim=5, vdim=3), (X, Y[..., :5], Y[..., :3])),
    "dropout": (attention(SELF, dropout=0.3), (X,)),
    "masks": (attention(SELF, masks={"attn_mask": MASK, "key_padding_mask": PADDING}, average=False), (X,)),
    "causal": (attention(SELF, masks={"attn_mask": MASK}, causal=True, need_weights=False), (X,)),
    "more keys": (attention(SELF, add_bias_kv=True, add_zero_attn=True), (X,)),
    "no biases, unbatched": (attention(SELF, heads=4, bias=False), (X[0],)),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (X,)),
    "encoder, norm first": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, norm_first=True), 2, enable_nested_tensor=False
        ),
        (X,),
    ),
    "decoder layer": (lambda: nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), (X, Y)),
    "transformer": (lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True), (X, Y)),
}
CASES = RECURRENT | ATTENTION


def leaves(value):
    return [value] if isinstance(value, torch.Tensor) else [leaf for item in value or () for leaf in leaves(item)]


def run(model, args):
    torch.manual_seed(3)
    outputs = leaves(model(*args))
    model.zero_grad()
    sum((tensor * torch.linspace(0.5, 1.5, tensor.numel()).view(tensor.shape)).sum() for tensor in outputs).backward()
    return [output.detach() for output in outputs]


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_masked_and_the_rest_is_eager(name):
    torch.manual_seed(0)
    make, args = CASES[name]
    model = make()
    sparse = fxsparse.sparsify(model, args, sparsity=0.5, distribution="uniform", method="static")
    added = {"layer.bias_k", "layer.bias_v"}
    assert set(sparse.masks) == {key for key, p in model.named_parameters() if p.ndim > 1} - added
    assert [key for key in sparse.state_dict() if not key.endswith("_mask")] == list(model.state_dict())
    eager = sparse.copy_to(copy.deepcopy(model))
    for mode in (True, False):
        eager.train(mode), sparse.train(mode)
        assert all(map(torch.equal, run(eager, args), run(sparse, args)))
        for (key, parameter), own in zip(eager.named_parameters(), sparse.parameters(), strict=True):
            expected = parameter.grad if key not in sparse.masks else parameter.grad * sparse.masks[key]
            assert torch.equal(own.grad, expected), key
    with torch.no_grad():  # eager may take the fused kernels for inference here
        for ours, theirs in zip(leaves(sparse.eval()(*args)), leaves(eager.eval()(*args)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gru, deep, both ways, dropout", "separate weights", "encoder layer"])
def test_other_batch_sizes_and_lengths(name):
    torch.manual_seed(0)
    make, args = CASES[name]
    model = make().eval()
    sparse = fxsparse.sparsify(model, args, sparsity=0.5, distribution="uniform", method="static").eval()
    eager = sparse.copy_to(copy.deepcopy(model))
    longer = tuple(torch.cat([arg, arg, arg])[:, [0, 1, 2, 3, 0, 1]] for arg in args)
    assert all(map(torch.equal, run(eager, longer), run(sparse, longer)))


def test_the_gradient_is_dense_on_request():
    torch.manual_seed(0)
    model = nn.GRU(8, 6, batch_first=True)
    sparse = fxsparse.sparsify(model, X, sparsity=0.5)
    eager = sparse.copy_to(copy.deepcopy(model))
    sparse.dense_gradient = True
    run(eager, (X,)), run(sparse, (X,))
    for key in sparse.masks:
        assert torch.equal(sparse.get_parameter(key).grad, eager.get_parameter(key).grad)


def test_frozen_attention_in_eval_mode_takes_the_ordinary_path():
    """Eager would take the fused kernel even while gradients are on, since nothing needs one."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).requires_grad_(False).eval()
    sparse = fxsparse.sparsify(model, X, sparsity=0.5, include="*", method="static")
    eager = sparse.copy_to(copy.deepcopy(model))
    torch.testing.assert_close(sparse.eval()(X), eager(X), rtol=1e-5, atol=1e-6)


def test_a_mask_that_is_a_global_constant():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

        def forward(self, x):
            return self.layer(x, src_mask=MASK)

    torch.manual_seed(0)
    model = Masked()
    sparse = fxsparse.sparsify(model, X, sparsity=0.0)
    assert torch.equal(sparse(X), model(X))


def test_tracing_leaves_torch_as_it_was():
    before = (
        F.multi_head_attention_forward,
        nn.RNNBase._update_flat_weights,
        torch.backends.mha.get_fastpath_enabled(),
    )
    trace(attention(SELF)(), X)
    with pytest.raises(fxsparse.CaptureError):
        trace(Packed(), X)
    after = (F.multi_head_attention_forward, nn.RNNBase._update_flat_weights, torch.backends.mha.get_fastpath_enabled())
    assert before == after and "_flat_weights" not in vars(nn.RNNBase)


class Packed(nn.Module):
    """Sequences of different lengths, packed: how many rows there are depends on the data."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(8, 6, batch_first=True)

    def forward(self, x):
        lengths = (x[..., 0] > -9).sum(1).cpu()
        return self.gru(rnn.pack_padded_sequence(x, lengths, batch_first=True))[1]


def test_packed_sequences_are_refused_with_the_reason():
    with pytest.raises(fxsparse.CaptureError, match="depends on the data"):
        fxsparse.sparsify(Packed(), X)


def test_a_parametrized_recurrent_weight_is_computed_at_every_call():
    torch.manual_seed(0)
    model = torch.nn.utils.parametrizations.weight_norm(nn.GRU(8, 6, batch_first=True), "weight_hh_l0")
    sparse = fxsparse.sparsify(model, X, sparsity=0.5, distribution="uniform", method="static")
    assert list(sparse.masks) == ["weight_ih_l0", "parametrizations.weight_hh_l0.original1"]
    with torch.no_grad():
        sparse.get_parameter("parametrizations.weight_hh_l0.original0").mul_(2)
    eager = sparse.copy_to(copy.deepcopy(model))
    assert all(map(torch.equal, run(eager, (X,)), run(sparse, (X,))))


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize(("normalise", "root"), [(weight_norm, "weight_v"), (spectral_norm, "weight_orig")])
def test_the_older_norms_by_hooks(normalise, root):
    torch.manual_seed(0)
    model = nn.Sequential(normalise(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3))
    model(FRAME)  # leaves a computed weight behind, which cannot be copied
    sparse = fxsparse.sparsify(model, FRAME, sparsity=0.5, method="static")
    assert list(sparse.masks) == [f"0.{root}", "2.weight"] and not sparse.notes
    eager = torch.nn.Sequential(normalise(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3))
    sparse.copy_to(eager)
    for mode in (True, True, False):
        eager.train(mode), sparse.train(mode)
        assert all(map(torch.equal, run(eager, (FRAME,)), run(sparse, (FRAME,))))
        for (key, parameter), own in zip(eager.named_parameters(), sparse.parameters(), strict=True):
            expected = parameter.grad if key not in sparse.masks else parameter.grad * sparse.masks[key]
            assert torch.equal(own.grad, expected), key
    buffers = {key: value for key, value in sparse.named_buffers() if not key.endswith("_mask")}
    assert all(torch.equal(value, buffers[key]) for key, value in eager.named_buffers())
    assert torch.equal(copy.deepcopy(sparse)(FRAME), sparse(FRAME))
