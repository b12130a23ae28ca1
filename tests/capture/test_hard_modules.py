"""Python that a careless tracer gets wrong without an error: captured it equals eager, or it is refused."""

import collections
import contextlib
import copy
import functools
import math
import operator
import random
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxsparse
from fxsparse.models.zoo import tensors
from fxsparse.models.zoo.two_linears import net


def seeded(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = seeded(4, 8)
OTHERS = (seeded(6, 8), seeded(1, 8))


def sparsify(model, example, sparsity=0.0, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxsparse.FxSparseWarning)
        return fxsparse.sparsify(model, example, sparsity=sparsity, **options)


def run(model, example, seed):
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
    return model(*copy.deepcopy(example))


def check(model, assert_same, *example, others=OTHERS):
    """Three calls in each mode, gradients and buffers, and other batch sizes."""
    sparse = sparsify(model, example)
    for mode in (True, False):
        model.train(mode), sparse.train(mode)
        for step in range(3):
            model.zero_grad(), sparse.zero_grad()
            expected, actual = run(model, example, step), run(sparse, example, step)
            assert_same(expected, actual)
        for output in (expected, actual):
            trained = [tensor for tensor in tensors(output) if tensor.requires_grad]
            sum(tensor.square().sum() for tensor in trained).backward()
        ours = dict(sparse.named_parameters()) | dict(sparse.named_buffers())
        for key, parameter in model.named_parameters():
            assert_same(parameter.grad, ours[key].grad)
        for key, buffer in model.named_buffers():
            assert_same(buffer, ours[key])
    if len(example) == 1 and example[0] is X:
        for other in others:
            assert_same(run(model, (other,), 0), run(sparse, (other,), 0))
    return sparse


# -- equal to eager ---------------------------------------------------------------------------------------


def dtypes_and_devices(self, x):
    y = x.to(self.fc.weight.dtype).to(x.device).type_as(x).to(x)
    assert y.dtype == torch.float32 and y.device == self.fc.weight.device and not y.is_cuda and y.is_floating_point()
    return self.head(self.fc(y) + x.new_zeros(x.shape) + x.new_full(x.size(), 2.0) + x.new_tensor([1.0] * 8))


def complex_numbers(self, x):
    z = torch.view_as_complex(self.fc(x).view(*x.shape[:-1], -1, 2))
    z = z * torch.polar(torch.ones(4), torch.arange(4.0)) * 1j
    return self.head(torch.view_as_real(z).flatten(-2)), torch.fft.fft(x).abs()


def functions_as_values(self, x):
    functions = {"relu": F.relu, "leaky": functools.partial(F.leaky_relu, negative_slope=0.3)}
    for name in functions:
        x = functions[name](self.fc(x))
    return self.head((lambda t: t * 2)(x)) + functools.reduce(operator.add, (x[:, :3] * i for i in range(3)))


def tensors_as_keys(self, x):
    known = {x: 1}
    assert x in known and known[x] == 1 and {8: "a"}[x.shape[-1]] == "a", f"{x.shape} {x}"
    return self.head(self.fc(x))


def asks_what_runs_it(self, x):
    if torch.jit.is_tracing() or torch.jit.is_scripting() or torch.compiler.is_compiling():
        return x
    return self.head(self.fc(x))


def changes_in_place(self, x):
    y = self.fc(x).clone()
    z = y
    y -= 1
    y **= 2
    y /= 3
    y.view(-1)[:4].mul_(2)
    y[:, None].add_(1)
    y.t()[0].mul_(2)
    torch.relu_(y)
    return self.head(y + z)


def changes_unused_results(self, x):
    y = self.fc(x)
    F.relu(y, inplace=True)
    y = y.clone()
    torch.clamp_(y, max=0.5)
    y.data.mul_(1.5)
    out = torch.empty_like(x)
    torch.add(x, 1, out=out)
    return self.head(y * out)


def fills_a_tensor(self, x):
    out = torch.empty(x.shape[0], 3)
    out[:] = self.head(self.fc(x))
    out[0, :2] = 5.0
    out[x[:, :3] > 0] = 0
    return out


def replaces_data(self, x):
    y = self.fc(x).detach()
    y.data = y.data + 1
    return self.head(y)


def loops_and_unpacks(self, x):
    out = []
    for i, (a, b) in enumerate(zip(x.unbind(1), self.fc(x).unbind(1), strict=True)):
        out += [a * b + i]
    first, *rest = torch.stack(out, 1).split([2, 3, 3], dim=-1)
    return self.head(torch.cat([*rest, first], -1))


def catches_and_logs(self, x):
    y = self.fc(x)
    with contextlib.suppress(ValueError):
        y = y + 1
    try:
        y = y * 2
    finally:
        y = y - 1
    warnings.warn(f"{x.shape} {y}", UserWarning, stacklevel=1) if x.ndim > 5 else None
    return self.head(y)


def takes_the_way_out(self, x):
    """The first way fails, for fake tensors as for real ones; no node of it may stay."""
    try:
        y = torch.cat([self.fc(x), x], dim=0).reshape(x.shape[0], 5)
    except (RuntimeError, ValueError):
        y = self.fc(x)
    return self.head(y)


def all_parameters(self, x):
    penalty = sum(parameter.square().sum() for parameter in self.parameters())
    norms = [parameter.norm() for name, parameter in self.named_parameters() if name.endswith("weight")]
    return self.head(self.fc(x)), penalty, torch.stack(norms), self.get_parameter("fc.weight").T.sum()


def differentiates(self, x):
    x = x.detach().requires_grad_(True)
    energy = self.fc(x).tanh().sum()
    (gradient,) = torch.autograd.grad(energy, x, create_graph=True)
    return self.head(gradient)


def scales_a_gradient(self, x):
    y = self.fc(x)
    return self.head(y * 2 - y.detach())


def modules_made_in_forward(self, x):
    return self.head(nn.Dropout(0.5)(nn.ReLU()(self.fc(x))))


def many_ways_to_call(self, x):
    y = torch.add(input=x, other=self.fc(input=x), alpha=2).__add__(1).__radd__(2)
    return self.head(2 - (y @ self.fc.weight.T) % 3) + (1 / (1 + y.square()))[:, :3]


def chains_of_views(self, x):
    y = self.fc(x)
    y = y.view(*y.shape[:-1], 2, 4).movedim(1, 2).flatten(1)[:, ::2].repeat(1, 2).narrow(1, 0, 8)
    return self.head(y.unfold(1, 8, 1).squeeze(1).roll(1, 0)).sort()[0]


def random_numbers(self, x):
    noise = torch.rand(x.shape[0], 1) + torch.randn_like(x[:, :1]) + torch.bernoulli(torch.full((1,), 0.5))
    return self.head(self.fc(x) * noise) + nn.init.normal_(torch.empty(3)) + torch.randperm(3)


def names_sizes(self, x):
    sizes = [*x.shape]
    rows, columns = x.shape
    assert isinstance(x.shape, torch.Size) and isinstance(x.shape, tuple) and isinstance(rows, int)
    assert (rows, columns) == x.shape == tuple(sizes) and x.shape[:1] + (8,) == x.shape  # noqa: RUF005
    return self.head(self.fc(x)) * (math.prod(x.shape) / x.numel()) * divmod(columns, 3)[1]


FORWARDS = [
    dtypes_and_devices,
    complex_numbers,
    functions_as_values,
    tensors_as_keys,
    asks_what_runs_it,
    changes_in_place,
    changes_unused_results,
    fills_a_tensor,
    replaces_data,
    loops_and_unpacks,
    catches_and_logs,
    takes_the_way_out,
    all_parameters,
    differentiates,
    scales_a_gradient,
    modules_made_in_forward,
    many_ways_to_call,
    chains_of_views,
    random_numbers,
    names_sizes,
]


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_forwards(forward, assert_same):
    check(net(forward), assert_same, X)


GLOBAL = torch.tensor([1.0, 2.0, 3.0])


def test_constants_live_outside_the_state_dict(assert_same):
    def prepare(self):
        self.scale, self.scales = torch.tensor(3.0), [torch.tensor(2.0), torch.tensor(0.5)]

    def forward(self, x):
        for scale in self.scales:
            x = x * scale
        return self.head(self.fc(x)) * self.scale * GLOBAL + torch.from_numpy(np.arange(3.0)).to(x)

    model = net(forward, prepare)
    sparse = check(model, assert_same, X)
    assert [key for key in sparse.state_dict() if "mask" not in key] == list(model.state_dict())
    again = copy.deepcopy(sparse)
    assert_same(sparse(X), again(X))
    again.fold()(X)


def test_weights_behind_properties_and_containers(assert_same):
    def prepare(self):
        self._own = nn.Parameter(seeded(8, 8))
        self.bag = {"a": self.fc.weight, "b": [self._own]}

    def forward(self, x):
        return self.head(F.linear(x, self.own) + F.linear(x, self.bag["a"]) + F.linear(x, self.bag["b"][0]))

    sparse = check(net(forward, prepare, own=property(lambda self: self._own)), assert_same, X)
    assert {site.name: len(site.uses) for site in sparse.sites} == {"_own": 2, "fc.weight": 1, "head.weight": 1}


def test_slices_of_sequences_of_modules(assert_same):
    def prepare(self):
        self.sequence = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.listed = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        x = self.sequence[2:](self.sequence[:2](x)) + self.sequence[0](x)
        x = functools.reduce(lambda value, layer: layer(value), self.listed, x) + sum(
            layer(x) for layer in self.listed[:2]
        )
        return self.head(x)

    sparse = check(net(forward, prepare), assert_same, X, others=(seeded(6, 8),))
    assert len(sparse.sites) == 6


def test_recursion(assert_same):
    class Nested(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.inner = Nested(depth - 1) if depth else None

        def forward(self, x):
            return self.fc(x) if self.inner is None else self.inner(torch.relu(self.fc(x)))

    torch.manual_seed(0)
    assert len(check(Nested(3), assert_same, X).sites) == 4


class Noise(nn.Module):
    """Kept as one call, since it has no weights: it may do as it likes."""

    def forward(self, x):
        if not self.training or random.random() < 0.3:
            return x
        self.last = float(x.abs().max())
        return x * np.random.rand() + torch.rand(())


def test_what_has_no_weights_is_free(assert_same):
    model = net(lambda self, x: self.head(self.noise(self.fc(x))), lambda self: setattr(self, "noise", Noise()))
    sparse = check(model, assert_same, X)
    assert sparse.noise.last == model.noise.last and not sparse.notes


def test_batch_norm_without_momentum(assert_same):
    """It reads its own counter, whose contents tracing does not know."""
    model = net(
        lambda self, x: self.head(self.norm(self.fc(x))),
        lambda self: setattr(self, "norm", nn.BatchNorm1d(8, momentum=None)),
    )
    check(model, assert_same, X, others=(seeded(6, 8),))


@pytest.mark.parametrize(
    ("parametrize", "root"),
    [
        (parametrizations.weight_norm, "original1"),
        (parametrizations.spectral_norm, "original"),
        (parametrizations.orthogonal, "original"),
    ],
)
def test_parametrized_weights_stay_parametrized(parametrize, root, assert_same):
    model = net(lambda self, x: self.head(self.fc(x)), lambda self: parametrize(self.fc))
    sparse = check(model, assert_same, X)
    assert [site.name for site in sparse.sites] == [f"fc.parametrizations.weight.{root}", "head.weight"]
    assert all("fc.parametrizations" in item.name for item in sparse.uncovered)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dtypes_and_memory_formats(dtype, memory_format, assert_same):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(128, 3))
    model = model.to(dtype).to(memory_format=memory_format)
    x = seeded(2, 4, 6, 6).to(dtype).to(memory_format=memory_format)
    sparse = sparsify(model, x)
    outputs = model(x), sparse(x)
    assert_same(*outputs)
    for output in outputs:
        output.abs().sum().backward()
    for (_, parameter), own in zip(model.named_parameters(), sparse.parameters(), strict=True):
        assert_same(parameter.grad, own.grad)


def test_inputs_that_require_gradients(assert_same):
    def gradients(module):
        x = X.clone().requires_grad_()
        module(x).square().sum().backward()
        return x.grad

    model = net(lambda self, x: self.head(torch.relu(self.fc(x))))
    assert_same(gradients(model), gradients(sparsify(model, X.clone().requires_grad_())))


def test_hooks_that_compute_are_in_the_graph(assert_same):
    """On a module that is traced through, on one that is kept as a call, and on the model itself."""

    def prepare(self):
        self.act = nn.ReLU()
        self.fc.register_forward_hook(lambda module, args, output: output * 2)
        self.fc.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        self.act.register_forward_hook(lambda module, args, output: output + 0.5)
        self.register_forward_hook(lambda module, args, output: output * 3)

    sparse = check(net(lambda self, x: self.head(self.act(self.fc(x))), prepare), assert_same, X)
    assert any("hooks on the model itself, fc ran once" in note for note in sparse.notes)


def test_gradient_hooks_are_announced():
    model = net(lambda self, x: self.head(self.fc(x)), lambda self: self.fc.weight.register_hook(lambda g: g * 2))
    with pytest.warns(fxsparse.FxSparseWarning, match=r"gradient hooks on fc\.weight are not copied"):
        fxsparse.sparsify(model, X)


@dataclass
class Output(collections.OrderedDict):
    """An output class like that of the transformers library: a dataclass that is a dict."""

    logits: Tensor | None = None
    extra: Tensor | None = None

    def __post_init__(self):
        for name in ("logits", "extra"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


@pytest.mark.parametrize("make", [collections.OrderedDict, Output, dict])
def test_output_classes(make, assert_same):
    sparse = check(net(lambda self, x: make(logits=self.head(self.fc(x)))), assert_same, X)
    assert type(sparse(X)) is make and list(sparse(X)) == ["logits"]


def test_lists_and_dicts_that_forward_changes(assert_same):
    def grows(self, features):
        features.append(self.fc(features[0]))
        features[0] = features[0] * 2
        return self.head(torch.cat(features, 0))

    check(net(grows), assert_same, [X, X + 1])

    def updates(self, batch):
        batch["y"] = self.fc(batch["x"])
        batch.update(z=batch["y"] * 2)
        return self.head(batch["y"] + batch.pop("x") + batch["z"]), len(batch), sorted(batch)

    check(net(updates), assert_same, {"x": X})


# -- caches, counters and memories ------------------------------------------------------------------------


@functools.lru_cache
def cached_table(length):
    return torch.arange(float(length)).cos()


def test_a_function_cache_is_left_without_values_of_the_trace(assert_same):
    cached_table.cache_clear()
    model = net(lambda self, x: self.head(self.fc(x) * cached_table(x.shape[-1])))
    sparse = sparsify(model, X)
    assert type(cached_table(8)) is Tensor
    assert_same(model(X), sparse(X))
    assert_same(cached_table(8), torch.arange(8.0).cos())


SEEN = []


class Caching(nn.Module):
    """A cache in the class and a list in the file: neither belongs to the module."""

    cache: dict = {}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        if "ones" not in self.cache:
            self.cache["ones"] = x.new_ones(3)
        SEEN.append(self.fc(x))
        return SEEN[-1] * self.cache["ones"]


def test_lists_and_dicts_outside_the_model_are_left_without_values_of_the_trace(assert_same):
    SEEN.clear(), Caching.cache.clear()
    model = Caching()
    with pytest.warns(fxsparse.FxSparseWarning, match="outside the model"):
        sparse = fxsparse.sparsify(model, X, sparsity=0.0)
    assert all(type(item) is Tensor for item in (*SEEN, *Caching.cache.values()))
    assert_same(model(X), sparse(X))


LAST = None


def test_a_value_of_the_trace_that_got_out_says_so_when_it_is_used():
    def forward(self, x):
        global LAST
        LAST = self.fc(x)
        return self.head(LAST)

    sparsify(net(forward), X, verify=False)
    with pytest.raises(fxsparse.CaptureError, match="while it was captured"):
        LAST + 1


def remembers_in_an_attribute(self, x):
    self.state = torch.tanh(self.fc(x) + (0 if self.state is None else self.state.detach()))
    return self.head(self.state)


def remembers_in_a_list(self, x):
    self.memory.append(self.fc(x).detach())
    return self.head(sum(self.memory) + x)


def counts_in_a_number(self, x):
    self.calls += 1
    return self.head(self.fc(x)) * self.calls


def counts_in_a_plain_tensor(self, x):
    self.count += 1
    return self.head(self.fc(x)) * self.count


@pytest.mark.parametrize(
    "forward", [remembers_in_an_attribute, remembers_in_a_list, counts_in_a_number, counts_in_a_plain_tensor]
)
def test_what_changes_from_call_to_call_is_refused(forward):
    """The first call is right, the second is not: a graph of one call does not remember."""

    def prepare(self):
        self.state, self.memory, self.calls, self.count = None, [], 0, torch.zeros(())

    with pytest.raises(fxsparse.VerificationError, match="computes something else"):
        sparsify(net(forward, prepare), X)


def test_attributes_that_do_not_matter_are_announced():
    def forward(self, x):
        self.calls, self.last = self.calls + 1, x
        return self.head(self.fc(x))

    model = net(forward, lambda self: setattr(self, "calls", 0))
    with pytest.warns(fxsparse.FxSparseWarning, match="forward changes calls, last; the graph leaves them"):
        sparse = fxsparse.sparsify(model, X)
    assert model.calls == sparse.calls == 0 and not hasattr(sparse, "last")


def test_modules_and_parameters_made_in_forward_are_refused():
    """Recorded, they would be drawn anew at every call."""

    def forward(self, x):
        if not hasattr(self, "late"):
            self.late = nn.Linear(x.shape[1], 8)
        return self.head(self.late(x))

    model = net(forward)
    with pytest.raises(fxsparse.CaptureError, match="adds or replaces parameters or submodules of the model"):
        sparsify(model, X)
    assert not hasattr(model, "late")
    model(X)
    assert [site.name for site in sparsify(model, X).sites] == ["late.weight", "head.weight"]


def sets_its_mode(self, x):
    self.norm.eval()
    return self.head(self.norm(self.fc(x)))


def asks_for_the_type(self, x):
    return self.head(self.fc(x)) if type(x) is Tensor else self.head(x)


@pytest.mark.parametrize("forward", [sets_its_mode, asks_for_the_type])
def test_what_only_running_can_show_is_refused_by_verification(forward):
    model = net(forward, lambda self: setattr(self, "norm", nn.BatchNorm1d(8)))
    with pytest.raises(fxsparse.VerificationError, match=r"of Net in (eval|train) mode computes something else"):
        sparsify(model, X)
