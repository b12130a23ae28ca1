"""What a graph takes as constant from its example is checked at every call: never silently wrong."""

import enum
import math
import pickle
import types
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse.models.zoo.two_linears import net


def seeded(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = seeded(4, 8)


def both(forward, example):
    model = net(forward).eval()
    return model, fxsparse.sparsify(model, example, sparsity=0.0).eval()


# -- arguments --------------------------------------------------------------------------------------------


class Reduction(enum.Enum):
    MEAN = 1
    SUM = 2


def with_flag(self, x, flag=False):
    return self.head(self.fc(x)) if flag else self.head(x)


def with_mask(self, x, mask=None):
    return self.head(self.fc(x) if mask is None else self.fc(x) * mask)


def with_number(self, x, rounds=2):
    for _ in range(rounds):
        x = self.fc(x)
    return self.head(x)


def with_name(self, x, *, kind="fc"):
    return self.head(getattr(self, kind)(x))


def with_enum(self, x, reduction=Reduction.MEAN):
    y = self.head(self.fc(x))
    return y.mean(0) if reduction is Reduction.MEAN else y.sum(0)


def with_containers(self, x, scales=[1.0, 2.0], names={"a": 1}):  # noqa: B006
    return self.head(self.fc(x) * scales[0] * names["a"])


MASK = torch.ones(4, 1)


@pytest.mark.parametrize(
    ("forward", "example", "wrong", "argument"),
    [
        (with_flag, (X,), (X, True), "flag"),
        (with_flag, (X, True), (X,), "flag"),
        (with_mask, (X,), (X, MASK), "mask"),
        (with_mask, (X, MASK), (X,), "mask"),
        (with_mask, (X, MASK), (X, None), "mask"),
        (with_mask, (X, None), (X, MASK), "mask"),
        (with_number, (X,), (X, 3), "rounds"),
        (with_number, (X, 1), (X,), "rounds"),
        (with_number, (X, 1), (X, True), "rounds"),
        (with_enum, (X,), (X, Reduction.SUM), "reduction"),
        (with_enum, (X, Reduction.SUM), (X,), "reduction"),
        (with_containers, (X,), (X, [3.0, 2.0]), r"scales\[0\]"),
        (with_containers, (X,), (X, [1.0]), "scales"),
        (with_containers, (X,), (X, [1.0, 2.0], {"a": 2}), r"names\['a'\]"),
        (with_containers, (X,), (X, [1.0, 2.0], {"b": 1}), "names"),
    ],
)
def test_another_value_is_refused_by_name(forward, example, wrong, argument, assert_same):
    model, sparse = both(forward, example)
    assert_same(model(*example), sparse(*example))
    with pytest.raises(fxsparse.InputError, match=f"argument {argument}: the graph was captured with"):
        sparse(*wrong)


def test_keyword_only_arguments():
    model, sparse = both(with_name, {"x": X, "kind": "fc"})
    assert torch.equal(model(X, kind="fc"), sparse(X, kind="fc")) and torch.equal(model(X), sparse(X))
    with pytest.raises(fxsparse.InputError, match="argument kind: the graph was captured with 'fc', got 'head'"):
        sparse(X, kind="head")
    with pytest.raises(fxsparse.InputError, match="argument kind"):
        both(lambda self, x, *, kind: self.head(x * kind), {"x": X, "kind": MASK})[1](X)


@pytest.mark.usefixtures("concrete_only")
def test_a_tensor_for_a_default_is_refused():
    def forward(self, x, scale=torch.ones(8)):  # noqa: B008
        return self.head(self.fc(x) * scale)

    with pytest.raises(fxsparse.CaptureError, match="default of its argument scale is a Tensor"):
        both(forward, (X,))
    model, sparse = both(forward, (X, 2 * torch.ones(8)))
    assert torch.equal(model(X, X[0]), sparse(X, X[0]))
    with pytest.raises(fxsparse.InputError, match="argument scale"):
        sparse(X)


def test_variadic_arguments():
    def forward(self, *xs, **more):
        return self.head(sum(self.fc(x) for x in xs)) + sum(value.sum() for value in more.values()) + len(xs)

    model, sparse = both(forward, (X, X))
    assert torch.equal(model(X, 2 * X), sparse(X, 2 * X))
    for wrong in ((X,), (X, X, X)):
        with pytest.raises(fxsparse.InputError, match=r"argument xs: .* a sequence of 2"):
            sparse(*wrong)
    with pytest.raises(fxsparse.InputError, match="argument more"):
        sparse(X, X, extra=X)


def test_dicts_keep_their_order():
    """`torch.cat(list(batch.values()))` of a dict in another order is another input."""
    model, sparse = both(
        lambda self, batch: self.head(self.fc(torch.cat(list(batch.values()), 1))), ({"a": X[:, :3], "b": X[:, 3:]},)
    )
    other = {"a": X[:, 1:4], "b": X[:, :5]}
    assert torch.equal(model(other), sparse(other))
    with pytest.raises(fxsparse.InputError, match=r"meets \['b', 'a'\] where the example gave \['a', 'b'\]"):
        sparse({"b": X[:, 3:], "a": X[:, :3]})
    with pytest.raises(fxsparse.InputError, match=r"a dict of \['a', 'b'\]"):
        sparse({"a": X[:, :3], "b": X[:, 3:], "c": X})


@dataclass
class Batch:
    x: Tensor
    scale: float = 1.0
    mask: Tensor | None = None


def test_objects_are_read_anew_and_their_flags_checked(assert_same):
    def forward(self, batch):
        y = self.fc(batch.x) * batch.scale
        return self.head(y if batch.mask is None else y * batch.mask)

    model, sparse = both(forward, (Batch(X),))
    other = Batch(seeded(7, 8), scale=3.0)
    assert_same(model(other), sparse(other))
    with pytest.raises(fxsparse.InputError, match="meets a tensor where the example gave None"):
        sparse(Batch(X, mask=MASK))

    model, sparse = both(
        lambda self, o: self.head(self.fc(o.x) if o.deep else o.x) * o.k,
        (types.SimpleNamespace(x=X, deep=True, k=2),),
    )
    other = types.SimpleNamespace(x=2 * X, deep=True, k=5)
    assert_same(model(other), sparse(other))
    with pytest.raises(fxsparse.InputError, match="meets False where the example gave True"):
        sparse(types.SimpleNamespace(x=X, deep=False, k=2))


def test_objects_that_forward_fills_are_filled_anew(assert_same):
    def forward(self, batch):
        batch.mask = self.head(self.fc(batch.x))
        return batch

    example = Batch(X)
    model, sparse = both(forward, (example,))
    assert example.mask is None
    expected, actual = model(Batch(2 * X)), sparse(Batch(2 * X))
    assert expected.mask is not None
    assert_same(expected, actual)


# -- numbers of dimensions --------------------------------------------------------------------------------


def by_rank(self, x):
    return self.head(self.fc(x.unsqueeze(1) if x.dim() == 2 else x)).mean(1)


def by_rank_of_a_shape(self, x):
    y = self.head(self.fc(x))
    return y.reshape(*y.shape[:-1], -1, 1) * len(x.shape) * math.prod(x.shape)


@dataclass
class Holder:
    x: Tensor


class Outer(nn.Module):
    """A branch on data, so that what is below is a unit."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if x.sum() > -1e9 else x


@pytest.mark.filterwarnings("ignore:.*is kept as one call")
@pytest.mark.parametrize("forward", [by_rank, by_rank_of_a_shape], ids=lambda f: f.__name__)
@pytest.mark.parametrize("opaque", [False, True])
def test_the_number_of_dimensions_is_the_examples(forward, opaque):
    model = (Outer(net(forward)) if opaque else net(forward)).eval()
    sparse = fxsparse.sparsify(model, seeded(2, 5, 8), sparsity=0.0).eval()
    assert sparse.capture == ("opaque" if opaque else "concrete")
    other = seeded(7, 3, 8)
    assert torch.equal(model(other), sparse(other))
    with pytest.raises(fxsparse.InputError, match=r"argument x: .* of 3 dimensions, got one of 2"):
        sparse(seeded(8, 8))


@pytest.mark.parametrize(
    ("pack", "unpack", "name"),
    [
        (lambda x: [x], lambda pack: pack[0], r"pack\[0\]"),
        (lambda x: {"x": x}, lambda pack: pack["x"], r"pack\['x'\]"),
        (Holder, lambda pack: pack.x, r"pack\.x"),
    ],
)
def test_the_number_of_dimensions_inside_a_container(pack, unpack, name):
    model, sparse = both(lambda self, pack: by_rank(self, unpack(pack)), (pack(seeded(2, 5, 8)),))
    assert torch.equal(model(pack(seeded(3, 4, 8))), sparse(pack(seeded(3, 4, 8))))
    with pytest.raises(fxsparse.InputError, match=rf"argument {name}: .* of 3 dimensions, got one of 2"):
        sparse(pack(X))


def with_bias_of_rank(self, x):
    return self.head(self.fc(x)) + x.dim()


@pytest.mark.filterwarnings("ignore:.*is kept as one call")
@pytest.mark.parametrize(
    ("inner", "units"),
    [(nn.Linear(8, 3), ["inner"]), (net(with_bias_of_rank), ["inner.fc", "inner.head"])],
    ids=["layer", "asks"],
)
def test_a_unit_that_is_called_with_several_ranks_does_not_ask_for_them(inner, units):
    class Twice(Outer):
        def forward(self, x):
            return self.inner(x) + self.inner(x[None])[0] if x.sum() > -1e9 else x

    model = Twice(inner).eval()
    sparse = fxsparse.sparsify(model, X, sparsity=0.0).eval()
    assert torch.equal(model(2 * X[:3]), sparse(2 * X[:3]))
    assert list(sparse.units.graphs["eval"]) == units


def test_the_check_compiles_and_goes_into_a_plain_module():
    model, sparse = both(by_rank, seeded(2, 5, 8))
    other = seeded(7, 3, 8)
    compiled = torch.compile(sparse, fullgraph=True, backend="eager")
    plain = sparse.fold().graph_module()
    for function in (compiled, plain, pickle.loads(pickle.dumps(plain))):
        assert torch.equal(model(other), function(other))
    with pytest.raises(AssertionError, match="captured with 3 dimensions"):
        plain(X)


# -- sizes ------------------------------------------------------------------------------------------------


def by_comparison(self, x):
    return self.head(self.fc(x)) * (2 if x.shape[0] > 4 else 1)


def by_truth(self, x):
    return self.head(self.fc(x)) * (2 if x.shape[0] % 2 else 1)


def by_length(self, x):
    return self.head(self.fc(x)) * len(x)


def by_float(self, x):
    return self.head(self.fc(x)) * float(x.shape[0])


def by_int(self, x):
    return self.head(self.fc(x)) * int(x.shape[0] / 2)


def by_range(self, x):
    return torch.stack([self.head(self.fc(x[i])) for i in range(x.size(0))])


def by_iteration(self, x):
    return torch.stack([self.head(self.fc(row)) for row in x])


def by_unpacking(self, x):
    return torch.stack([self.head(self.fc(row)) for row in x.unbind(0)])


def by_pieces(self, x):
    return torch.cat([self.head(self.fc(piece)) for piece in x.split(2)])


def by_maximum(self, x):
    return self.head(self.fc(x)) * max(x.shape[0], 5)


def by_lookup(self, x):
    return self.head(self.fc(x)) * {4: 1.0, 6: 2.0}[x.shape[0]]


def by_membership(self, x):
    return self.head(self.fc(x)) * (2 if x.shape[0] in {6, 7} else 1)


def by_torch_size(self, x):
    return self.head(self.fc(x)).reshape(torch.Size((x.shape[0], 3, 1)))


def by_repeated_list(self, x):
    return self.head(self.fc(x)) * sum([1.5] * x.shape[0]) * len(x.shape[0] * (1,))


def by_repeated_tensors(self, x):
    return sum([self.head(self.fc(x))] * x.shape[0])


def by_list_of_repeated_tensors(self, x):
    return self.head(self.fc(x)) * len(([x] * x.shape[0] + [x])[1:])


@pytest.mark.parametrize("batch", [1, 6, 7])
@pytest.mark.parametrize(
    "forward",
    [
        by_comparison,
        by_truth,
        by_length,
        by_float,
        by_int,
        by_range,
        by_iteration,
        by_unpacking,
        by_pieces,
        by_maximum,
        by_lookup,
        by_membership,
        by_torch_size,
        by_repeated_list,
        by_repeated_tensors,
        by_list_of_repeated_tensors,
    ],
    ids=lambda f: f.__name__,
)
def test_decisions_on_sizes_are_right_or_refused(forward, batch):
    """With the example's sizes the graph is the model; with others it is either the model or an error."""
    model, sparse = both(forward, X)
    assert torch.equal(model(2 * X), sparse(2 * X))
    x = seeded(batch, 8, seed=1)
    try:
        actual = sparse(x)
    except fxsparse.InputError as error:
        assert "test_baked_values.py:" in str(error) and "meets" in str(error)
        assert forward is not by_comparison or batch > 4  # the same way is taken there: no reason to refuse
        return
    assert torch.equal(model(x), actual)


def test_which_decisions_differ():
    outcomes = {}
    for batch in (1, 6):
        for forward in (by_comparison, by_truth, by_maximum, by_membership):
            _, sparse = both(forward, X)
            try:
                sparse(seeded(batch, 8))
                outcomes[forward.__name__, batch] = "runs"
            except fxsparse.InputError:
                outcomes[forward.__name__, batch] = "refused"
    assert outcomes == {
        ("by_comparison", 1): "runs",
        ("by_comparison", 6): "refused",
        ("by_truth", 1): "refused",
        ("by_truth", 6): "runs",
        ("by_maximum", 1): "runs",
        ("by_maximum", 6): "refused",
        ("by_membership", 1): "refused",  # a size that was hashed is baked
        ("by_membership", 6): "refused",
    }


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.head(self.fc(x)) / math.sqrt(x.shape[0]),
        lambda self, x: self.head(self.fc(x)) * x.shape[0] ** -0.5 + x.shape[0] // 2,
        lambda self, x: self.head(self.fc(x))[: x.shape[0] // 2 + 1] + round(x.shape[0] / 3),
        lambda self, x: self.head(self.fc(x)) + torch.arange(x.shape[0])[:, None] * math.ceil(x.shape[0] / 3),
        lambda self, x: self.head(self.fc(x)) + x.new_ones(x.shape[0], 1) + torch.zeros(len(x.shape), x.size(0), 1)[0],
        lambda self, x: self.head(self.fc(x.reshape(x.shape[:-1] + (2, -1)).mT.flatten(-2))),  # noqa: RUF005
        lambda self, x: self.head(self.fc(x.view((*x.shape[:-1], 2, x.shape[-1] // 2)).reshape(x.shape))),
        lambda self, x: self.head(self.fc(x)) * torch.hann_window(x.shape[0] + 2)[1:-1, None] * x.numel(),
        lambda self, x: torch.cat([self.head(self.fc(x))] * x.shape[0]) + torch.stack([x] * x.shape[0]).sum(),
        lambda self, x: (self.head(self.fc(x)), x.shape, x.shape[0] * 2, {"n": x.size(0)}),
    ],
)
@pytest.mark.parametrize("batch", [1, 3, 9])
def test_arithmetic_on_sizes_holds_for_every_batch(forward, batch, assert_same):
    model, sparse = both(forward, X)
    x = seeded(batch, 8, seed=1)
    assert_same(model(x), sparse(x))


def sizes_as_arguments():
    """torch asks every argument whether it is a number; that is no decision of forward."""
    return {
        "broadcast_to": lambda x, n: torch.broadcast_to(x[:, :1], (n, 8)),
        "roll": lambda x, n: torch.roll(x, n - 1, 0) + torch.roll(x, (n - 1, 1), (0, 1)),
        "narrow": lambda x, n: torch.narrow(x, 0, 0, n) + x.narrow(0, n - 1, 1),
        "split": lambda x, n: torch.split(torch.cat([x, x]), [n, n], 0)[0],
        "reshape": lambda x, n: torch.reshape(x, (n, 2, 4)).flatten(1) + x.view([n, 8]) + x.reshape(n, -1),
        "repeat_interleave": lambda x, n: torch.repeat_interleave(x, n, dim=0)[:n],
        "zeros": lambda x, n: torch.zeros(n, 8) + torch.ones((n, 8)) + torch.full((n, 8), n) + x,
        "eye": lambda x, n: torch.eye(n) @ x + torch.ones(n, n).triu(1) @ x,
        "linspace": lambda x, n: torch.linspace(0, n, n)[:, None] + x + torch.arange(1, n + 1, 1)[:, None],
        "pad": lambda x, n: F.pad(x, (n, 0))[:, n:] + F.pad(x, [0, 0, n, n])[n : 2 * n],
        "interpolate": lambda x, n: F.interpolate(x[None, None], size=(n * 2, 8), mode="bilinear")[0, 0, ::2],
        "adaptive_avg_pool2d": lambda x, n: F.adaptive_avg_pool2d(x[None], (n, 8))[0],
        "avg_pool1d": lambda x, n: F.avg_pool1d(x.t()[None], n).mean() + x,
        "one_hot": lambda x, n: F.one_hot(torch.arange(n), 8) + x,
        "tril": lambda x, n: torch.tril(x, n - 2),
        "unflatten": lambda x, n: torch.unflatten(x.flatten(), 0, (n, 8)) + x.flatten().unflatten(0, (n, -1)),
        "as_strided": lambda x, n: torch.as_strided(x, (n, 8), (8, 1)),
        "select": lambda x, n: torch.select(x, 0, n - 1) + x + x.select(0, n // 2) + x[n - 1] + x[-n],
        "scalars": lambda x, n: torch.add(x, n) + torch.clamp(x, -n, n) + x.sub(n, alpha=n) + torch.div(x, n),
        "new": lambda x, n: x.new_zeros(n, 8) + x.new_full((n, 8), n) + x.new_ones([n, 8]) + x,
        "layer_norm": lambda x, n: F.layer_norm(x.t(), (n,)).t() if n > 1 else x,
        "tensor": lambda x, n: torch.tensor([n, 1, n]).sum() + torch.tensor(n) + torch.scalar_tensor(n) + x,
        "sum": lambda x, n: torch.sum(x, n - n)[None] + torch.mean(x, dim=n - n) + x,
        "gather": lambda x, n: torch.gather(x, 0, torch.zeros(n, 8, dtype=torch.long)) + x[torch.arange(n) % n],
        "conv1d": lambda x, n: F.conv1d(x.t()[None], torch.ones(8, 8, 1), padding=n)[0].t()[n:-n],
        "rand": lambda x, n: 0 * torch.rand(n, 8) + 0 * torch.randint(0, n, (n, 8)) + x,
    }


@pytest.mark.parametrize("name", sizes_as_arguments())
def test_torch_takes_sizes_as_arguments(name, assert_same):
    function = sizes_as_arguments()[name]
    model, sparse = both(lambda self, x: function(self.fc(x), x.shape[0]), X)
    for batch in (2, 5):
        x = seeded(batch, 8, seed=1)
        assert_same(model(x), sparse(x))


def test_a_part_in_another_mode_than_the_model():
    """`model.train(); model.block.eval()` is common in fine-tuning. One graph a mode cannot follow it."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.dropout(self.fc(x), 0.5, self.training)

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.norm, self.head = Block(), nn.BatchNorm1d(8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.norm(self.block(x)))

    model = Normed()
    sparse = fxsparse.sparsify(model, X, sparsity=0.0)
    for module in (model, sparse):
        module.train()
        module.norm.eval()  # kept as one call, which has a mode of its own
        torch.manual_seed(0)
        module.result = module(X)
    assert torch.equal(model.result, sparse.result)
    sparse.block.eval()
    with pytest.raises(fxsparse.InputError, match="block is in eval mode while the model is in train mode"):
        sparse(X)
    assert torch.equal(sparse.eval()(X), model.eval()(X))

    class Frozen(Normed):
        def train(self, mode=True):
            super().train(mode)
            self.block.eval()
            return self

    model = Frozen().train()
    sparse = fxsparse.sparsify(model, X, sparsity=0.0)
    for mode in (True, False, True):
        assert torch.equal(model.train(mode)(X), sparse.train(mode)(X))
        assert not sparse.block.training and sparse.norm.training == mode
