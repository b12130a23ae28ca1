"""What the forwards of large libraries contain: regions without gradients, caches, decorators, scripted helpers."""

import copy
import dataclasses
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from fxsparse.passes.trace import trace

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.usefixtures("concrete_only")


def net(forward, **attributes):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
            for name, value in attributes.items():
                setattr(self, name, value)

    Net.forward = forward
    torch.manual_seed(0)
    return Net()


def sparsify(model, example=X):
    return fxsparse.sparsify(model, example, sparsity=0.0, distribution="uniform")


def gradients(model, output):
    model.zero_grad()
    output.sum().backward()
    return [parameter.grad for parameter in model.parameters()]


# -- regions without gradients -------------------------------------------------------------------------------


def no_grad_target(self, x):
    y = torch.softmax(self.fc(x), -1)
    with torch.no_grad():
        first, second = y.chunk(2, -1)
        bound = self.fc.weight.amax() + x.amax()
    return self.head(torch.cat([second, first], -1)) * bound + self.fc(x)


def decorated_no_grad(self, x):
    @torch.no_grad()
    def scale(value):
        return self.head(value).abs().mean()

    return self.fc(x) * scale(self.fc(x))


@pytest.mark.parametrize("forward", [no_grad_target, decorated_no_grad])
def test_a_no_grad_region_stops_the_same_gradients(forward, assert_same):
    model = net(forward)
    sparse = sparsify(model)
    expected, actual = model(X), sparse(X)
    assert_same(expected, actual)
    assert_same(gradients(model, expected), gradients(sparse, actual))
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()  # and those of the input, whatever it was once
    model(x).sum().backward(), sparse(y).sum().backward()
    assert_same(x.grad, y.grad)


def in_place_in_region(self, x):
    y = self.fc(x)
    with torch.no_grad():
        y.mul_(2)
    return self.head(y)


def inference_region(self, x):
    with torch.inference_mode():
        scale = x.abs().mean()
    return self.head(self.fc(x)) * 2 if scale is not None else x


@pytest.mark.parametrize(
    ("forward", "reason"),
    [(in_place_in_region, "in-place change inside a no_grad region"), (inference_region, "inference_mode region")],
)
def test_what_a_region_cannot_hold_is_refused(forward, reason):
    with pytest.raises(fxsparse.CaptureError, match=reason):
        sparsify(net(forward))


def test_integers_in_a_region_need_nothing():
    def forward(self, x):
        with torch.no_grad():
            places = torch.arange(x.shape[0]) % 2
        return self.head(self.fc(x)) * places[:, None]

    graph = trace(net(forward), X).graphs["train"]
    assert not [node for node in graph.nodes if node.target == "detach"]


# -- random numbers against a bound --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keeps", "runs"),
    [
        (lambda draw: draw < 0.0, False),
        (lambda draw: draw >= 0, True),
        (lambda draw: draw < 1.0, True),
        (lambda draw: draw > 1.0, False),
        (lambda draw: draw <= -0.1, False),
        (lambda draw: draw > -1, True),
        (lambda draw: draw >= 1.5, False),
        (lambda draw: 0.0 > draw, False),  # noqa: SIM300 - a number may stand first
        (lambda draw: 1.0 > draw, True),  # noqa: SIM300
    ],
)
def test_a_certain_comparison_is_no_branch_and_the_number_is_drawn(keeps, runs, assert_same):
    def forward(self, x):
        x = self.fc(x) if keeps(torch.rand([])) else x
        return self.head(x) * torch.rand(x.shape)

    model = net(forward)
    sparse = sparsify(model)
    assert ("fc.weight" in sparse.masks) == runs
    torch.manual_seed(5)
    expected = model(X)
    torch.manual_seed(5)
    assert_same(expected, sparse(X))


@pytest.mark.parametrize(
    "keeps",
    [lambda d: d < 0.1, lambda d: d <= 0.0, lambda d: d > 0, lambda d: d == 0.0, lambda d: d - 1 < 0.0],
)
def test_an_open_comparison_stays_refused(keeps):
    with pytest.raises(fxsparse.CaptureError, match="truth value of a tensor"):
        sparsify(net(lambda self, x: self.head(self.fc(x) if keeps(torch.rand([])) else x)))
    with pytest.raises(fxsparse.CaptureError, match="truth value of a tensor"):
        sparsify(net(lambda self, x: self.head(self.fc(x) if torch.randn([]) < 0.0 else x)))


def test_a_number_that_was_changed_in_place_is_open_again():
    def forward(self, x):
        draw = torch.rand([])
        draw -= 1
        return self.head(self.fc(x) if draw < 0 else x)

    with pytest.raises(fxsparse.CaptureError, match="truth value of a tensor"):
        sparsify(net(forward))


# -- objects, decorators, scripted functions -----------------------------------------------------------------


class Layer:
    def __init__(self):
        self.keys, self.kind, self.length = None, Layer, 0

    def update(self, keys):
        self.keys, self.length = keys, keys.shape[0]


class Cache:
    """Keys of every layer, as text models return them for the next call."""

    def __init__(self, layers):
        self.layers = [Layer() for _ in range(layers)]
        self.device = None

    def update(self, index, keys):
        self.layers[index].update(keys)
        self.device = keys.device
        return keys


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    cache: Cache


def cached(self, x):
    cache = Cache(2)
    x = cache.update(0, self.fc(x))
    return Output(self.head(cache.update(1, F.relu(x))), cache)


def test_an_object_with_tensors_is_made_anew_at_every_call(assert_same):
    model = net(cached)
    sparse = sparsify(model)
    for twin in (sparse, copy.deepcopy(sparse)):
        for example in (X, X[:3]):
            expected, actual = model(example), twin(example)
            assert_same(expected.logits, actual.logits)
            assert type(actual.cache) is Cache and actual.cache.device == X.device
            for one, other in zip(expected.cache.layers, actual.cache.layers, strict=True):
                assert_same(one.keys, other.keys)
                assert other.length == len(example) and other.kind is Layer
    first, second = sparse(X), sparse(X)
    assert first.cache is not second.cache and first.cache.layers[0] is not second.cache.layers[0]
    assert pickle.loads(pickle.dumps(sparse.graph.find_nodes(op="output")[0].name))


def test_an_object_that_refers_to_itself_is_refused():
    def forward(self, x):
        cache = Cache(1)
        cache.update(0, self.head(self.fc(x)))
        cache.own = cache
        return cache

    with pytest.raises(fxsparse.CaptureError, match="Cache that refers to itself"):
        sparsify(net(forward))


def test_a_decorator_sees_keywords_as_the_example_gave_them(assert_same):
    def pops(function):
        @functools.wraps(function)
        def call(self, *args, **kwargs):
            assert "x" in kwargs and "return_dict" not in kwargs and not args
            return function(self, *args, **kwargs)

        return call

    @pops
    def forward(self, x=None, scale=2.0, return_dict=None):
        return self.head(self.fc(x)) * scale

    model = net(forward)
    sparse = fxsparse.sparsify(model, {"x": X, "scale": 3.0}, sparsity=0.0, distribution="uniform")
    assert_same(model(x=X, scale=3.0), sparse(x=X, scale=3.0))


def test_a_failed_trace_lets_go_of_what_it_held():
    """The error's traceback would hold variables of forward, and with them values of the trace."""
    kept = []

    def forward(self, x):
        output = Output(self.fc(x), Cache(1))
        kept.append(output)
        return output if output.logits.sum() > 0 else x

    with pytest.raises(fxsparse.CaptureError, match="truth value"):
        sparsify(net(forward))


def root_of_width(x: torch.Tensor, factor: int):
    return x / torch.sqrt(torch.tensor(x.size(-1), dtype=torch.float) * factor)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_scripted_function_is_seen_through(assert_same):
    scripted = torch.jit.script(root_of_width)
    model = net(lambda self, x: scripted(self.head(self.fc(x)), 3))
    sparse = sparsify(model)
    assert_same(model(X), sparse(X))
    assert_same(model(X[:2]), sparse(X[:2]))


def test_grouped_products_are_captured_in_single_precision(assert_same):
    if not hasattr(F, "grouped_mm"):
        pytest.skip("a function of newer versions of torch")
    ends = torch.tensor([1, 4], dtype=torch.int32)

    def forward(self, x):
        return self.head(F.grouped_mm(self.fc(x), self.experts, offs=self.ends))

    model = net(forward, experts=nn.Parameter(torch.randn(2, 8, 8)))
    model.register_buffer("ends", ends)
    assert_same(model(X), sparsify(model)(X))
