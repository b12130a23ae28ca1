"""GRU calls with sparse weights: the operator against torch's, and which calls of a model are lowered."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxsparse
import fxsparse.models as models
from fxsparse.kernels.recurrent import TiledGRU, _sparse_gru, lowered_gru, untiled
from fxsparse.passes import lower_recurrent

SPARSE = {"method": "static", "sparsity": 0.8, "distribution": "erk", "verify": False}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def masked_gru(inputs, hidden, density, dtype=torch.float32, bias=True, batch_first=False):
    """An `nn.GRU` with zeros at masked positions, and its masks."""
    layer = nn.GRU(inputs, hidden, bias=bias, batch_first=batch_first, dtype=dtype).eval().requires_grad_(False)
    masks = [torch.rand(weight.shape) < density for weight in (layer.weight_ih_l0, layer.weight_hh_l0)]
    layer.weight_ih_l0.mul_(masks[0])
    layer.weight_hh_l0.mul_(masks[1])
    return layer, masks


def tiles_of(layer, masks):
    biases = (layer.bias_ih_l0, layer.bias_hh_l0) if layer.bias else ()
    return TiledGRU.of(layer.weight_ih_l0, layer.weight_hh_l0, *masks, *biases)


def arguments(own, x, h):
    """Of the operator; `x` is (batch, time, inputs) and `h` (batch, hidden)."""
    return F.linear(x, own.input_weight, own.input_bias), h, own.values, own.tiles, own.bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize(
    ("batch", "time", "inputs", "hidden"), [(1, 7, 20, 40), (3, 1, 5, 1), (2, 3, 64, 96), (5, 4, 1, 33)]
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_operator_gives_what_torch_gives(dtype, density, batch, time, inputs, hidden, batch_first):
    torch.manual_seed(hidden + int(100 * density))
    layer, masks = masked_gru(inputs, hidden, density, dtype, bias=time != 3, batch_first=batch_first)
    own = tiles_of(layer, masks)
    x = torch.randn((batch, time, inputs) if batch_first else (time, batch, inputs), dtype=dtype)
    h = torch.randn(1, batch, hidden, dtype=dtype)
    from_input = F.linear(x, own.input_weight, own.input_bias)
    found = lowered_gru(from_input, h, own.values, own.tiles, own.bias, batch_first)
    for one, other in zip(found, layer(x, h), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE[dtype])


def test_large_states_and_gates_at_their_limits():
    layer, masks = masked_gru(3, 48, 0.2)
    own, x = tiles_of(layer, masks), 1e4 * torch.randn(2, 5, 3)
    h = 1e6 * torch.randn(1, 2, 48)
    expected = layer(x.transpose(0, 1), h)[0].transpose(0, 1)
    found, last = torch.ops.fxsparse.sparse_gru(*arguments(own, x, h[0]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(last, found[:, -1])


def test_a_value_near_zero_keeps_its_relative_precision_to_1e_5_of_the_largest():
    layer, masks = masked_gru(4, 16, 0.5, bias=False)
    x = 1e-3 * torch.randn(1, 6, 4)
    expected = layer.double()(x.double().transpose(0, 1))[0].transpose(0, 1)
    found = torch.ops.fxsparse.sparse_gru(*arguments(tiles_of(layer.float(), masks), x, torch.zeros(1, 16)))[0]
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_and_infinity_reach_the_units_whose_weights_read_them_and_no_others(bad, dtype):
    torch.manual_seed(0)
    layer, masks = masked_gru(4, 50, 0.15, dtype)
    own, h = tiles_of(layer, masks), torch.randn(1, 50, dtype=dtype)
    h[0, 32] = bad  # the first column of a tile is what lanes without a weight would read
    x = torch.randn(1, 1, 4, dtype=dtype)
    found = torch.ops.fxsparse.sparse_gru(*arguments(own, x, h))[0][0, 0]
    products = torch.where(masks[1], layer.weight_hh_l0 * h, 0.0).sum(1) + layer.bias_hh_l0
    of_input = layer.weight_ih_l0 @ x[0, 0] + layer.bias_ih_l0
    reset, update = torch.sigmoid((of_input + products)[:100]).chunk(2)
    fresh = torch.tanh(of_input[100:] + reset * products[100:])
    expected = fresh + update * (h[0] - fresh)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, equal_nan=True)
    readers = masks[1][:, 32].view(3, 50).any(0)
    readers[32] = True
    assert found[~readers].isfinite().all() and 5 < int((~readers).sum()) < 49
    if bad != bad:
        assert found[readers].isnan().all()


def test_nan_in_the_input_of_one_sequence_stays_in_it():
    layer, masks = masked_gru(4, 20, 0.3)
    x = torch.randn(2, 5, 4)
    x[0, 2, 1] = float("nan")
    found, last = torch.ops.fxsparse.sparse_gru(*arguments(tiles_of(layer, masks), x, torch.zeros(2, 20)))
    expected = layer(x.transpose(0, 1))[0].transpose(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, equal_nan=True)
    assert found[0, 2:].isnan().any() and found[1].isfinite().all() and last[1].isfinite().all()


def test_what_the_shapes_do_not_allow_is_refused():
    layer, masks = masked_gru(4, 20, 0.3)
    own = tiles_of(layer, masks)
    with pytest.raises(RuntimeError, match="sequence"):
        layer(torch.randn(0, 2, 4))
    with pytest.raises(RuntimeError, match="at least one step"):
        torch.ops.fxsparse.sparse_gru(*arguments(own, torch.randn(2, 0, 4), torch.zeros(2, 20)))
    with pytest.raises(ValueError, match=r"\[2, 5, 96\] and \[3, 20\]"):
        torch.ops.fxsparse.sparse_gru(*arguments(own, torch.randn(2, 5, 4), torch.zeros(3, 20)))
    with pytest.raises(ValueError, match="not for a state of 21"):
        torch.ops.fxsparse.sparse_gru(*arguments(own, torch.randn(2, 5, 4), torch.zeros(2, 21)))
    with pytest.raises(ValueError, match="Double"):
        torch.ops.fxsparse.sparse_gru(*arguments(own, torch.randn(2, 5, 4), torch.zeros(2, 20).double()))


def test_no_sequences_and_inputs_that_are_not_contiguous():
    layer, masks = masked_gru(4, 20, 0.3)
    own = tiles_of(layer, masks)
    states, last = torch.ops.fxsparse.sparse_gru(*arguments(own, torch.randn(0, 5, 4), torch.zeros(0, 20)))
    assert states.shape == (0, 5, 20) and last.shape == (0, 20)
    from_input, h, *rest = arguments(own, torch.randn(2, 5, 4), torch.randn(2, 20))
    expected = torch.ops.fxsparse.sparse_gru(from_input, h, *rest)
    strided = from_input.transpose(0, 1).contiguous().transpose(0, 1), h.t().contiguous().t()
    assert not any(tensor.is_contiguous() for tensor in strided)
    for found, right in zip(torch.ops.fxsparse.sparse_gru(*strided, *rest), expected, strict=True):
        assert torch.equal(found, right)


def test_without_the_kernels_torch_gives_the_same():
    layer, masks = masked_gru(6, 37, 0.2)
    given = arguments(tiles_of(layer, masks), torch.randn(3, 4, 6), torch.randn(3, 37))
    for found, expected in zip(_sparse_gru(*given), torch.ops.fxsparse.sparse_gru(*given), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wanting", ["input", "state"])
def test_gradients_are_refused(wanting):
    layer, masks = masked_gru(5, 8, 0.5)
    own, x, h = tiles_of(layer, masks), torch.randn(3, 2, 5), torch.zeros(1, 2, 8)
    from_input = F.linear(x, own.input_weight, own.input_bias)
    (from_input if wanting == "input" else h).requires_grad_()
    for found in lowered_gru(from_input, h, own.values, own.tiles, own.bias, False):
        with pytest.raises(fxsparse.InputError, match="lowered for inference has no gradients"):
            found.sum().backward()


def test_tiles_hold_every_weight_once():
    layer, masks = masked_gru(3, 100, 0.1)
    own = tiles_of(layer, masks)
    rows = torch.cat([gate * 112 + torch.arange(100) for gate in range(3)])
    dense = untiled(own.values, own.tiles)[rows].view(3, 100, 100)
    assert torch.equal(own.units.long().sort().values, torch.arange(100))
    assert torch.equal(dense, layer.weight_hh_l0.view(3, 100, 100)[:, own.units.long()])
    # one more than each value's place: of a weight that is 0 as well
    assert int(((own.stored.long()[:, None] >> torch.arange(16)) & 1).sum()) == int(masks[1].sum())


def test_the_operator_is_right_in_compiled_graphs():
    layer, masks = masked_gru(4, 20, 0.3)
    given = arguments(tiles_of(layer, masks), torch.randn(2, 5, 4), torch.randn(2, 20))
    torch.library.opcheck(torch.ops.fxsparse.sparse_gru.default, given, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda *args: lowered_gru(*args, True), fullgraph=True, backend="aot_eager")
    from_input, h, *rest = given
    for found, expected in zip(
        compiled(from_input, h[None], *rest), lowered_gru(from_input, h[None], *rest, True), strict=True
    ):
        assert torch.equal(found, expected)


# -- models ---------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.gru = nn.GRU(12, 24, **options)
        self.readout = nn.Linear(24 * (1 + bool(options.get("bidirectional"))), 3)

    def forward(self, x, h=None):
        states, last = self.gru(x, h)
        return self.readout(states), last


def reasons(lowered):
    return {decision.name: decision.reason for decision in lowered.decisions if not decision.lowered}


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}, {"dropout": 0.0, "batch_first": True}])
@pytest.mark.parametrize("state", [False, True])
def test_a_model_lowered_for_inference_gives_what_the_masked_one_gives(options, state):
    torch.manual_seed(0)
    x, h = torch.randn(4, 2, 12), torch.randn(1, 4 if options.get("batch_first") else 2, 24)
    given = (x, h) if state else (x,)
    sparse = fxsparse.sparsify(Net(**options), given, **SPARSE).eval()
    lowered = sparse.lower(layers="all")
    assert not reasons(lowered) and torch.gru not in {node.target for node in lowered.graph.nodes}
    assert "gru.weight_hh_l0" not in lowered.state_dict()
    expected = sparse(*given)
    copies = [lowered, copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered))]
    for module in copies:
        for found, right in zip(module(*given), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=1e-5)


def test_other_lengths_and_batches_run_as_well():
    torch.manual_seed(0)
    sparse = fxsparse.sparsify(Net(), torch.randn(4, 2, 12), **SPARSE).eval()
    lowered, x = sparse.lower(layers="all"), torch.randn(9, 5, 12)
    torch.testing.assert_close(lowered(x)[0], sparse(x)[0], rtol=0, atol=1e-5)


def test_the_weights_that_are_asked_for():
    sparse = fxsparse.sparsify(Net(), torch.randn(4, 2, 12), **SPARSE)
    of_state = sparse.lower(layers=["*_hh_l0"])
    assert set(reasons(of_state)) == {"gru.weight_ih_l0", "readout.weight"}
    of_input = sparse.lower(layers=["*_ih_l0"])
    assert reasons(of_input)["gru.weight_ih_l0"] == "the call stays dense without gru.weight_hh_l0"
    x = torch.randn(4, 2, 12)
    for module in (of_state, of_input):
        torch.testing.assert_close(module(x)[0], sparse.eval()(x)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_layers": 2}, "several layers or both directions"),
        ({"bidirectional": True}, "several layers or both directions"),
    ],
)
def test_what_has_no_kernel_stays_dense_with_the_reason(options, reason):
    torch.manual_seed(0)
    x = torch.randn(4, 2, 12)
    sparse = fxsparse.sparsify(Net(**options), x, **SPARSE).eval()
    lowered = sparse.lower(layers="all")
    names = [name for name in reasons(lowered) if name.startswith("gru")]
    assert len(names) == 4 and all(reason in reasons(lowered)[name] for name in names)
    torch.testing.assert_close(lowered(x)[0], sparse(x)[0], rtol=0, atol=1e-5)


def test_other_recurrent_calls_stay_dense():
    class Others(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.cell = nn.LSTM(12, 24), nn.GRUCell(24, 8)

        def forward(self, x):
            return self.cell(self.lstm(x)[0][-1])

    lowered = fxsparse.sparsify(Others(), torch.randn(4, 2, 12), **SPARSE).lower(layers="all")
    assert reasons(lowered) == {
        "lstm.weight_ih_l0": "lstm has no sparse kernel",
        "lstm.weight_hh_l0": "lstm has no sparse kernel",
        "cell.weight_ih": "gru_cell has no sparse kernel",
        "cell.weight_hh": "gru_cell has no sparse kernel",
    }


def test_packed_sequences_stay_dense():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(12, 24)

        def forward(self, x, lengths):
            return self.gru(nn.utils.rnn.pack_padded_sequence(x, lengths))[1]

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.packed, self.readout = Packed(), nn.Linear(24, 3)

        def forward(self, x, lengths):
            return self.readout(self.packed(x, lengths))

    given = torch.randn(4, 2, 12), torch.tensor([4, 2])
    sparse = fxsparse.sparsify(Around(), given, **SPARSE).eval()
    lowered = sparse.lower(layers="all", verify=False)  # the lengths are not random
    assert not reasons(lowered)
    torch.testing.assert_close(lowered(*given), sparse(*given), rtol=0, atol=1e-5)
    graph = fx.Graph()
    data, sizes, h, weight = (graph.placeholder(name) for name in ("data", "sizes", "h", "weight"))
    call = graph.call_function(torch.gru, (data, sizes, h, [weight, weight], False, 1, 0.0, False, False))
    assert lower_recurrent._recurrence(nn.Module(), call, {}) == "a packed sequence has no sparse kernel"


def test_inside_a_call_that_could_not_be_looked_into_it_stays_dense():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(12, 24)

        def forward(self, x):
            return self.gru(x)[0] * float(x.sum().numpy() > -1e9)

    model = nn.Sequential(Odd(), nn.Linear(24, 3))
    x = torch.randn(4, 2, 12)
    sparse = fxsparse.sparsify(model, x, **SPARSE).eval()
    lowered = sparse.lower(layers="all")
    why = "it is used inside a submodule that stays one call"
    assert reasons(lowered) == {"0.gru.weight_ih_l0": why, "0.gru.weight_hh_l0": why}
    torch.testing.assert_close(lowered(x), sparse(x), rtol=0, atol=1e-5)


def test_training_leaves_it_dense():
    sparse = fxsparse.sparsify(Net(), torch.randn(4, 2, 12), **SPARSE)
    sparse.lower(train=True, layers="all")
    assert set(sparse.lowered) == {"readout.weight"}
    decided = {decision.name: decision.reason for decision in sparse._storage.decisions}
    assert decided["gru.weight_hh_l0"] == "a gru has a sparse kernel for inference alone"


def test_an_embedding_is_multiplied_beforehand(monkeypatch, tmp_path):
    torch.manual_seed(0)
    monkeypatch.setenv("FXSPARSE_CACHE", str(tmp_path))
    monkeypatch.setattr("fxsparse.lowering.recurrences._measure", lambda *_: [2.0, 3.0, 4.0, 9.0])
    model = models.char_gru(num_classes=20, width=1 / 8, unrolled=False)
    tokens = torch.randint(20, (2, 6))
    sparse = fxsparse.sparsify(model, tokens, **SPARSE).eval()
    lowered = sparse.lower()
    (loop,) = lowered.graph.find_nodes(op="call_function", target=lowered_gru)
    assert loop.args[0].target is F.embedding
    assert lowered.get_buffer(loop.args[0].args[1].target).shape == (20, 3 * 64)
    assert "multiplied with the embedding" in reasons(lowered)["gru.gru.weight_ih_l0"]
    for found, right in zip(lowered(tokens), sparse(tokens), strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("seconds", "sparse_weights", "dense_reason"),
    [
        ([2.0, 1.0, 4.0, 9.0], {"gru.weight_ih_l0", "gru.weight_hh_l0"}, None),
        ([1.0, 2.0, 4.0, 9.0], {"gru.weight_hh_l0"}, "dense is faster"),
        ([2.0, 1.0, 4.0, 4.5], set(), "dense is faster"),
    ],
)
def test_the_faster_way_is_taken(monkeypatch, tmp_path, seconds, sparse_weights, dense_reason):
    monkeypatch.setenv("FXSPARSE_CACHE", str(tmp_path))
    monkeypatch.setattr("fxsparse.lowering.recurrences._measure", lambda *_: seconds)
    lowered = fxsparse.sparsify(Net(), torch.randn(4, 2, 12), **SPARSE).lower()
    decisions = {d.name: d for d in lowered.decisions if d.name.startswith("gru")}
    assert {name for name, decision in decisions.items() if decision.lowered} == sparse_weights
    assert {d.reason for d in decisions.values() if not d.lowered} <= {dense_reason}
    calls_torch = any(node.target is torch.gru for node in lowered.graph.nodes)
    assert calls_torch == (not sparse_weights)
