"""What cannot be traced stays one call; the weights inside are masked all the same, and nothing else changes."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse.capture import opaque_submodules
from fxsparse.models.zoo import ZOO
from fxsparse.passes.trace import trace

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Head(nn.Module):
    """As many rounds as the largest value says: nothing that a graph holds. One layer is used by its weight."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.bare = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        for _ in range(1 + int(x.detach().abs().max() > 0)):
            x = self.drop(self.mix(x))
        if x.sum() > 1e9:
            x = self.unused(x)
        return x @ self.bare.weight


class Net(nn.Module):
    """A traceable stem and classifier around a head that is not."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = Head()
        self.classifier = nn.Linear(8, 5)

    def forward(self, x):
        return self.classifier(self.head(self.stem(x).mean((2, 3))))


class Branch(nn.Module):
    """Reads its own mode, and branches on data."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        x = nn.functional.dropout(self.fc(x), 0.5, self.training)
        return x if x.sum() > 0 else -x


def net():
    torch.manual_seed(0)
    return Net()


def sparsify(model, example=X, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxsparse.FxSparseWarning)
        return fxsparse.sparsify(model, example, **{"sparsity": 0.5, "distribution": "uniform", **options})


def run(model, example=X):
    torch.manual_seed(3)
    return model(example.clone())


def test_the_graph_is_kept_around_the_head_and_the_reason_is_said():
    captured = trace(net(), X)
    graph = captured.graphs["eval"]
    called = [node.target for node in graph.find_nodes(op="call_module")]
    assert captured.mechanism == "opaque" and called.count("head") == 1
    assert {node.target for node in graph.find_nodes(op="get_attr")} >= {"stem.0.weight", "classifier.weight"}
    assert list(captured.units.opaque) == ["head"]
    (note,) = captured.notes
    assert "Head head is kept as one call" in note and "test_opaque.py" in note and "int(x.detach()" in note


def test_every_layer_is_masked_or_named_with_the_reason():
    sparse = sparsify(net())
    assert [site.name for site in sparse.sites] == [
        "stem.0.weight",
        "classifier.weight",
        "head.mix.0.weight",
        "head.unused.weight",
    ]
    (uncovered,) = sparse.uncovered
    assert uncovered.name == "head.bare.weight" and "used inside of Head head, which is one call" in uncovered.reason
    assert "kept as one call" in sparse.report()


def test_outputs_gradients_and_statistics_equal_eager(assert_same):
    model = net()
    sparse = sparsify(model)
    sparse.copy_to(model)
    for training in (False, True, False):
        model.train(training), sparse.train(training)
        expected, actual = run(model), run(sparse)
        assert_same(expected, actual)
        model.zero_grad(), sparse.zero_grad()
        expected.square().sum().backward(), actual.square().sum().backward()
        ours, buffers = dict(sparse.named_parameters()), dict(sparse.named_buffers())
        for name, parameter in model.named_parameters():
            wanted = parameter.grad
            if name in sparse.masks and wanted is not None:
                wanted = torch.where(sparse.masks[name], wanted, 0)
            assert_same(wanted, ours[name].grad)
        for name, buffer in model.named_buffers():
            assert_same(buffer, buffers[name])


def test_masks_inside_take_effect_in_the_units():
    """Weights that are put back behind a mask stay without effect: the unit multiplies, not the storage."""
    sparse = sparsify(net()).eval()
    before = run(sparse)
    with torch.no_grad():
        for name in ("head.mix.0.weight", "stem.0.weight"):
            sparse.get_parameter(name)[~sparse.masks[name]] = 7.0
    assert torch.equal(run(sparse), before)


def test_the_users_model_and_its_class_are_untouched():
    model = net()
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    sparsify(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert not any(hasattr(cls.forward, "whole") for cls in (Head, Net, nn.Linear))


@pytest.mark.parametrize("name", ["data_branch", "data_loop", "layer_drop", "autocast_region"])
def test_a_model_that_is_opaque_as_a_whole(name, assert_same):
    torch.manual_seed(0)
    model, example = ZOO[name].make(), ZOO[name].example()
    sparse = sparsify(model, example)
    assert sparse.capture == "opaque" and not sparse.uncovered
    assert [key for key in sparse.state_dict() if not key.endswith("_mask")] == list(model.state_dict())
    sparse.copy_to(model)
    for training in (True, False, True):
        model.train(training), sparse.train(training)
        for factor in (1, -1, 3):  # other branches, other numbers of rounds
            assert_same(run(model, factor * example), run(sparse, factor * example))


def test_the_mode_reaches_a_forward_that_is_one_call(assert_same):
    torch.manual_seed(0)
    model, example = Branch(), torch.randn(4, 8)
    sparse = sparsify(model, example)
    sparse.copy_to(model)
    for twin in (sparse, copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        for training in (False, True, False):
            model.train(training), twin.train(training)
            assert_same(run(model, example), run(twin, example))


@pytest.mark.parametrize("make", [lambda: (net(), X), lambda: (ZOO["data_loop"].make(), ZOO["data_loop"].example())])
def test_copies_pickles_and_folded_modules_are_independent(make, assert_same):
    model, example = make()
    sparse = sparsify(model, example)
    expected = run(sparse.eval(), example)
    others = [copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse)), sparse.fold()]
    for other in others:
        assert_same(expected, run(other.eval(), example))
        assert not {id(module) for module in sparse.modules()} & {id(module) for module in other.modules()}
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1.0)
        assert not torch.equal(expected, run(other, example))
        assert_same(expected, run(sparse, example))
    assert list(others[2].state_dict()) == list(model.state_dict())


def test_flops_of_units_count_every_call_and_the_rest_is_named():
    sparse = sparsify(net(), sparsity=0.0)
    report = sparse.flops()
    stem, mix, classifier = 4 * 14 * 14 * 8 * 27, 2 * 4 * 8 * 8, 4 * 8 * 5  # the loop makes two rounds
    assert report.macs == stem + mix + classifier
    assert list(report.unknown.values()) == [("Head itself, kept as one call",)]
    assert fxsparse.count_flops(net(), X).macs == report.macs
    with pytest.raises(fxsparse.InputError, match="capture it again"):
        fxsparse.count_flops(sparse, X[:2])
    (line,) = [line for line in sparse.report().splitlines() if line.startswith("head.mix.0.weight")]
    assert line.split()[-1] == str(mix)


def test_channels_stay_and_compaction_says_why():
    found = fxsparse.channel_groups(net(), X)  # the stem's channels enter the head, the classifier's are the output
    assert not [atom for group in found.groups for atom in group.atoms if atom.status == "exact"]
    with pytest.raises(fxsparse.CaptureError, match="cannot compact Net: head is kept as one call"):
        sparsify(net()).compact()


def test_a_child_called_in_two_ways_is_opened_further():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x, scale=None):
            return self.fc(x) if scale is None else self.fc(x) * scale

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(self.inner(x), x.abs().max()) if x.max() > -9 else x

    captured = trace(Outer(), torch.randn(2, 8))
    assert list(captured.units.graphs["eval"]) == ["inner.fc"]


@pytest.fixture
def wrong_unit(monkeypatch):
    """The graph of the unit `head.mix` hands its input through."""
    plain = opaque_submodules.unit_graph

    def wrong(graph, name):
        made = plain(graph, name)
        if name == "head.mix":
            made.output_node().args = (made.find_nodes(op="placeholder")[0],)
        return made

    monkeypatch.setattr(opaque_submodules, "unit_graph", wrong)


def test_a_unit_whose_numbers_differ_is_opened_further(wrong_unit):
    """Its graph is run beside the module in a run of the example."""
    assert list(trace(net(), X).units.graphs["eval"]) == ["head.bare", "head.unused", "head.mix.0"]


def test_a_unit_that_cannot_be_compared_is_no_unit():
    """Inside of a `vmap`, nobody can look at numbers; a unit beside it stays."""

    class Jacobian(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.first(x)
            return torch.vmap(torch.func.jacrev(self.second))(x) if x.sum() < 1e9 else x

    sparse = sparsify(Jacobian(), torch.randn(2, 8))
    assert [site.name for site in sparse.sites] == ["first.weight"]
    assert [(left.name, left.reason.endswith("by Linear second")) for left in sparse.uncovered] == [
        ("second.weight", True)
    ]


def test_verification_compares_units_with_what_the_user_wrote(wrong_unit, monkeypatch):
    monkeypatch.setattr(opaque_submodules._Inside, "_differing", lambda *args: [])
    with pytest.raises(fxsparse.VerificationError, match="computes something else than the model"):
        sparsify(net())


def test_hooks_inside_keep_firing():
    model = net()
    fired = []
    model.head.mix[0].register_forward_hook(lambda module, args, output: fired.append(len(args)))
    sparse = sparsify(model, verify=False)
    fired.clear()
    run(sparse)
    assert fired == [1, 1]


def test_where_nothing_inside_can_be_reached_the_first_refusal_counts():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return x @ self.weight if x.sum() > 0 else x

    with pytest.raises(fxsparse.CaptureError, match="truth value of a tensor depends on its data"):
        fxsparse.sparsify(Bare(), torch.randn(2, 8))


class InFloat(nn.Linear):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class Branching(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Binary(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, Sign.apply(self.weight), self.bias)


@pytest.mark.parametrize("layer", [InFloat, Branching, Binary])
def test_a_layer_that_is_one_call_leaves_the_others_their_masks(layer, assert_same):
    torch.manual_seed(0)
    model, example = nn.Sequential(nn.Linear(8, 8), layer(8, 8), nn.Linear(8, 3)), torch.randn(4, 8)
    sparse = sparsify(model, example)
    assert [site.name for site in sparse.sites] == ["0.weight", "2.weight"]
    (left,) = sparse.uncovered
    assert left.name == "1.weight"
    assert left.reason.startswith(f"used inside of {layer.__name__} 1, which is one call")
    sparse.copy_to(model)
    expected, actual = model(-example), sparse(-example)
    assert_same(expected, actual)
    expected.sum().backward(), actual.sum().backward()
    assert_same(model[1].weight.grad, sparse.get_parameter("1.weight").grad)
    assert sparse.flops().unknown


class Recurrent(nn.Module):
    def __init__(self, packs):
        super().__init__()
        self.rnn, self.head, self.packs = nn.GRU(8, 6, batch_first=True), nn.Linear(6, 3), packs

    def forward(self, x, lengths=None):
        if self.packs:
            x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return self.head(self.rnn(x)[1][-1])


@pytest.mark.parametrize("packs", [True, False])
def test_packed_sequences_leave_the_recurrent_weights_without_a_mask(packs, assert_same):
    torch.manual_seed(0)
    model, rows, lengths = Recurrent(packs), torch.randn(3, 4, 8), torch.tensor([4, 3, 1])
    example = (rows, lengths) if packs else nn.utils.rnn.pack_padded_sequence(rows, lengths, batch_first=True)
    sparse = sparsify(model, example)
    assert [site.name for site in sparse.sites] == ["head.weight"]
    assert all("which is one call" in left.reason for left in sparse.uncovered) and len(sparse.uncovered) == 2
    sparse.copy_to(model)
    args = example if packs else (example,)
    assert_same(model(*args), sparse(*args))


def test_rewiring_inside_units():
    model = net()
    sparse = sparsify(model, method="rigl", update_interval=2)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    sparse.attach(optimizer, total_steps=20)
    before = {name: mask.clone() for name, mask in sparse.masks.items()}
    counts = sparse.active_counts
    for _ in range(6):
        optimizer.zero_grad()
        run(sparse).square().mean().backward()
        optimizer.step()
        for name, mask in sparse.masks.items():
            weight = sparse.get_parameter(name)
            assert not weight[~mask].any()
    assert sparse.active_counts == counts
    assert not torch.equal(before["head.mix.0.weight"], sparse.masks["head.mix.0.weight"])
