"""What cannot be captured gets an error that says where and why, and leaves everything as it was."""

import builtins
import copy
import inspect
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import checkpoint

import fxsparse
from fxsparse.capture.concrete_proxy import ConcreteProxy
from fxsparse.models.zoo import ZOO, call, tensors
from fxsparse.models.zoo.two_linears import net

pytestmark = pytest.mark.usefixtures("concrete_only")

REFUSED = {
    "data_branch": ("if x.mean() > 0:", "truth value of a tensor depends on its data"),
    "data_loop": ("for _ in range(int(x.abs().max()) + 1):", "integer value of a tensor depends on its data"),
    "layer_drop": ("if self.training and torch.rand(()) < 0.3:", "truth value of a tensor depends on its data"),
    "autocast_region": ("with torch.autocast(x.device.type, dtype=torch.bfloat16):", "autocast region"),
}
"""Zoo case -> the line of its forward that is at fault, and the reason."""


def refusal(model, example, capture="auto"):
    with pytest.raises(fxsparse.CaptureError) as info:
        fxsparse.sparsify(model, example, capture=capture)
    return str(info.value)


def line_number(cls, text):
    lines, first = inspect.getsourcelines(cls)
    return first + next(index for index, line in enumerate(lines) if text in line)


OUTSIDE = nn.Parameter(torch.ones(3)) * 2
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def test_every_refused_case_of_the_zoo_is_here():
    assert set(REFUSED) == {name for name, case in ZOO.items() if case.refused}


@pytest.mark.parametrize("name", REFUSED)
def test_the_message_names_module_line_and_reason(name):
    line, reason = REFUSED[name]
    model = ZOO[name].make()
    message = refusal(model, ZOO[name].example())
    assert f"{inspect.getsourcefile(type(model))}:{line_number(type(model), line)}: `{line}`" in message
    assert type(model).__name__ in message and reason in message


@pytest.mark.parametrize("name", REFUSED)
def test_the_model_works_afterwards(name):
    torch.manual_seed(0)
    model = ZOO[name].make()
    twin, example = copy.deepcopy(model), ZOO[name].example()
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    refusal(model, example)
    assert random.getstate() == state[0] and np.random.get_state()[1].tolist() == state[1]
    assert torch.equal(torch.get_rng_state(), state[2])
    held = [v for m in model.modules() for v in (*m.__dict__.values(), *m._buffers.values(), *m._parameters.values())]
    assert not any(isinstance(value, ConcreteProxy) for value in held)
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]
    torch.manual_seed(1)
    expected = list(tensors(call(twin, example)))
    torch.manual_seed(1)
    for tensor, other in zip(expected, tensors(call(model, example)), strict=True):
        assert torch.equal(tensor, other)


def fails_late(self, x):
    self.kept, self.calls, x = self.fc(x), self.calls + 1, torch.arange(8) + x
    self.log.append(x)
    self.counter += 1
    if x.sum() > 0:
        return x
    return self.head(x)


def prepare_late(self):
    self.kept, self.calls, self.log = None, 0, []
    self.register_buffer("counter", torch.zeros(()))


def test_attributes_and_buffers_are_put_back():
    """Captured in place, as the analyses do: not even the copy keeps anything."""
    from fxsparse.capture.concrete_tracer import ConcreteTracer

    model = net(fails_late, prepare_late)
    buffer, log = model.counter, model.log
    with pytest.raises(fxsparse.CaptureError, match="truth value"):
        ConcreteTracer(model).capture((X,), {})
    assert model.kept is None and model.calls == 0 and model.log is log and log == []
    assert model.counter is buffer and buffer.item() == 0


@pytest.mark.parametrize("forward", [fails_late, lambda self, x: self.head(self.fc(x))], ids=["refused", "captured"])
def test_python_and_torch_are_put_back(forward):
    def patched():
        own = [builtins.isinstance, nn.Module.__call__, nn.Module.__getattr__, F.linear, F._verify_batch_size]
        own += [torch.arange, torch.zeros, torch.rand, torch.tensor, torch.autocast.__enter__]
        own += [torch.autograd.Function.__dict__.get("apply"), checkpoint.CheckpointFunction]
        return own

    before, names = patched(), set(vars(nn.Module))
    model = net(forward, prepare_late)
    if forward is fails_late:
        refusal(model, X)
    else:
        fxsparse.sparsify(model, X)
    assert patched() == before and set(vars(nn.Module)) == names and inspect.isbuiltin(builtins.isinstance)
    assert type(torch.arange(3)) is torch.Tensor and torch.is_grad_enabled()
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda self, x: self.head(self.fc(x)) * x.sum().item(), "depends on the data"),
        (lambda self, x: self.head(self.fc(x))[x[:, 0] > 0], "shape or value of the result depends on the data"),
        (lambda self, x: self.head(self.fc(x)) if 0.5 in x else x, "membership in a tensor"),
        (lambda self, x: self.head(self.fc(x)) * float(x.mean()), "float value of a tensor"),
        (lambda self, x: self.head(self.fc(x)) * random.random(), "Python's random"),
        (lambda self, x: self.head(self.fc(x)) * float(np.random.rand()), "numpy.random"),
        (lambda self, x: torch.manual_seed(3) and self.head(self.fc(x)), "draws from torch outside the graph"),
        (lambda self, x: self.head(self.fc(x)) * torch.Tensor(3).uniform_(), "changes a constant in place"),
        (lambda self, x: self.head(self.fc(x)) + OUTSIDE, "computed outside of forward"),
        (lambda self, x: self.head(self.fc(x.reshape(-1, 5))), "invalid for input of size"),
        (lambda self, x: self.head(F.linear(x, self.unregistered[0])), "not a member of this module"),
    ],
)
def test_reasons(forward, reason):
    def prepare(self):
        self.unregistered = (nn.Parameter(torch.randn(8, 8)),)

    model = net(forward, prepare)
    state = torch.get_rng_state()
    message = refusal(model, X, "concrete")
    assert reason in message and "cannot capture Net" in message
    assert torch.equal(torch.get_rng_state(), state)


def test_a_caught_refusal_is_still_a_refusal():
    """Eager takes the first way; a graph of the second would run, and compute something else."""

    def forward(self, x):
        try:
            if x.abs().max() > 0:
                return self.head(self.fc(x))
        except Exception:
            pass
        return self.head(x)

    def forward_by_item(self, x):
        try:
            scale = x.abs().max().item()
        except Exception:
            scale = 1.0
        return self.head(self.fc(x)) * scale

    assert "truth value" in refusal(net(forward), X)
    assert "data" in refusal(net(forward_by_item), X)


def test_a_buffer_assigned_anew_is_refused():
    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean()
        return self.head(self.fc(x)) - self.mean

    message = refusal(net(forward, lambda self: self.register_buffer("mean", torch.zeros(()))), X, "concrete")
    assert "buffer mean anew" in message and "copy_" in message


class Count(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def test_an_autograd_function_is_refused_by_name_and_kept_inside_a_weightless_module(assert_same):
    message = refusal(net(lambda self, x: self.head(Count.apply(self.fc(x)))), X)
    assert "autograd function Count" in message

    class Wrapped(nn.Module):
        def forward(self, x):
            return Count.apply(x)

    model = net(lambda self, x: self.head(self.act(self.fc(x))), lambda self: setattr(self, "act", Wrapped()))
    sparse = fxsparse.sparsify(model, X, sparsity=0.0)
    for module in (model, sparse):
        module(X).sum().backward()
    assert_same(model.fc.weight.grad, sparse.get_parameter("fc.weight").grad)


def test_examples_that_do_not_fit():
    model = net(lambda self, x, y: self.head(self.fc(x + y)))
    for example in (X, (X, X, X), {"x": X, "z": X}):
        with pytest.raises(fxsparse.InputError, match=r"example_input does not fit Net\.forward\(x, y\)"):
            fxsparse.sparsify(model, example)
    for example in ([X, X], 3, {1: X}):
        with pytest.raises(fxsparse.InputError, match="tuple of positional arguments"):
            fxsparse.sparsify(model, example)


def test_models_that_cannot_be_copied_or_read():
    lazy = nn.Sequential(nn.LazyLinear(3))
    assert "0.weight has no shape yet" in refusal(lazy, X)
    import torch.nn.utils.prune as prune

    pruned = net(lambda self, x: self.head(self.fc(x)))
    prune.l1_unstructured(pruned.fc, "weight", 0.5)
    message = refusal(pruned, X)
    assert "fc.weight is computed from other tensors" in message and "prune.remove" in message
    prune.remove(pruned.fc, "weight")
    assert len(fxsparse.sparsify(pruned, X).sites) == 2
    assert "not Python code" in refusal(torch.jit.script(nn.Sequential(nn.Linear(8, 8))), X)


def test_a_sparse_module_is_not_sparsified_again():
    model = net(lambda self, x: self.head(self.fc(x)))
    sparse = fxsparse.sparsify(model, X)
    assert "has masks already" in refusal(sparse, X)
    again = fxsparse.sparsify(sparse.fold(), X)
    assert [site.name for site in again.sites] == [site.name for site in sparse.sites]
    model.fc.weight_mask = torch.ones(8, 8)
    with pytest.raises(fxsparse.SelectionError, match=r"fc\.weight_mask already exists"):
        fxsparse.sparsify(model, X)


@pytest.mark.parametrize("name", ["report", "graph", "masks", "example", "method", "dense_gradient", "forward_train"])
def test_names_of_ours_are_refused(name):
    """Else the graph would read our attribute in place of the model's."""
    for value in (nn.Linear(8, 8), nn.Parameter(torch.ones(8)), torch.ones(8)):
        model = net(lambda self, x: self.head(self.fc(x) * self._read(name)))
        type(model)._read = lambda self, name: (self.__dict__ | self._parameters).get(name, 1)
        value_is_plain = isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)
        model.__dict__[name] = value if value_is_plain else None
        if not value_is_plain:
            del model.__dict__[name]
            (model._modules if isinstance(value, nn.Module) else model._parameters)[name] = value
        assert f"Net.{name} has the name of an attribute of SparseModule; rename it" in refusal(model, X)


def test_a_plain_attribute_that_the_graph_does_not_read_may_have_any_name():
    model = net(lambda self, x: self.head(self.fc(x)))
    model.seed, model.method, model.notes, model.sites = 3, "mine", ["a"], None
    sparse = fxsparse.sparsify(model, X)
    assert torch.equal(fxsparse.sparsify(model, X, sparsity=0.0)(X), model(X)) and len(sparse.sites) == 2
