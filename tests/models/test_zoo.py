"""The zoo's networks run, and are as hard as they claim to be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from fxsparse.models import zoo
from fxsparse.models.zoo import ZOO

ALL = pytest.mark.parametrize("name", ZOO)
MODES = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])

LAYER_FUNCTIONS = {
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
}


def make(name):
    torch.manual_seed(0)
    return ZOO[name].make()


def run(name, model):
    """The output's tensors, with the example and the random state the same every time."""
    torch.manual_seed(1)
    return list(zoo.tensors(zoo.call(model, ZOO[name].example())))


class WeightOperands(TorchFunctionMode):
    """Collects the parameters that a layer function gets as its weight, and the embeddings' tables."""

    def __init__(self):
        super().__init__()
        self.layers, self.tables = {}, set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.embedding:
            self.tables.add(id(kwargs["weight"] if "weight" in kwargs else args[1]))
        for weight in weights_of(func, args, kwargs):
            sizes = None if func is torch.bmm else {weight.numel()}  # a bank is stacked, or chosen from
            self.layers |= {id(root): root for root in roots(weight, func not in PRODUCTS, sizes)}
        return func(*args, **kwargs)


PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.einsum, torch.addmm)
RECURRENT = (torch.gru, torch.lstm, torch.gru_cell)


def weights_of(func, args, kwargs):
    """The arguments of a call that may be weights."""
    if func in LAYER_FUNCTIONS:
        return [kwargs["weight"] if "weight" in kwargs else args[1]]
    if func is F.multi_head_attention_forward:
        return [args[5], args[11]]
    if func in RECURRENT:
        return list(zoo.tensors(args[2:]))
    return list(zoo.tensors(args)) if func in PRODUCTS or func is torch.bmm else []


def roots(weight, computed, sizes):
    """The parameter that a weight is, is a view of, or (where asked) is computed from, by its size (or of any)."""
    if isinstance(weight, nn.Parameter) or isinstance(weight._base, nn.Parameter):
        found = {weight if isinstance(weight, nn.Parameter) else weight._base}
    else:
        found, open_functions = set(), [weight.grad_fn] if computed and weight.grad_fn is not None else []
        while open_functions:
            function = open_functions.pop()
            if hasattr(function, "variable") and (sizes is None or function.variable.numel() in sizes):
                found.add(function.variable)
            open_functions += [before for before, _ in getattr(function, "next_functions", ()) if before is not None]
    return {parameter for parameter in found if parameter.ndim > 1}


def test_no_name_twice():
    assert len(ZOO) == sum(len(theme.CASES) for theme in zoo.THEMES) > 80


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@ALL
@MODES
def test_runs_forward_and_backward(name, train):
    model = make(name).train(train)
    outputs = run(name, model)
    assert all(torch.isfinite(out).all() for out in outputs)
    sum(out.float().sum() for out in outputs if out.requires_grad).backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        run(name, model)


@ALL
@MODES
def test_only_dropout_makes_two_runs_differ(name, train):
    model = make(name).train(train)
    outputs = [
        list(zoo.tensors(zoo.call(copy.deepcopy(model), ZOO[name].example()))) for _ in range(4)
    ]  # fresh random numbers for each, and a fresh copy of every buffer
    same = all(torch.equal(a, b) for other in outputs[1:] for a, b in zip(outputs[0], other, strict=True))
    assert same != (train and ZOO[name].dropout)


@ALL
def test_sites_are_the_parameters_that_reach_a_layer(name):
    if ZOO[name].refused:
        assert ZOO[name].sites is None
        return
    model = make(name)
    operands = WeightOperands()
    with operands:
        for train in (True, False):
            run(name, model.train(train))
    assert len(operands.layers.keys() - operands.tables) == ZOO[name].sites


@ALL
def test_every_network_says_what_is_hard(name):
    case = ZOO[name]
    assert case.make.__doc__ and len(case.make.__doc__) > 30
    assert case.refused is None or len(case.refused) > 10


def test_modes_differ_in_structure():
    model = make("auxiliary_head")
    assert len(run("auxiliary_head", model.train())) == 2
    assert len(run("auxiliary_head", model.eval())) == 1


def test_inplace_alias_is_not_the_out_of_place_network():
    model, x = make("inplace_alias"), ZOO["inplace_alias"].example()
    y = model.fc(x)
    out_of_place = model.head(torch.tanh((y + 1) * 2) + y)
    assert not torch.allclose(model(x), out_of_place)


def test_buffers_move_in_forward():
    counter = make("running_counter")
    for _ in range(3):
        run("running_counter", counter)
    assert counter.calls == 3
    augmented = make("augmented_counter")
    run("augmented_counter", augmented.train())
    run("augmented_counter", augmented.eval())
    assert augmented.calls == 1 and "calls" in augmented.state_dict()


def test_frozen_batch_norm_stays_frozen():
    model = make("frozen_batch_norm").train()
    run("frozen_batch_norm", model)
    assert not model.bn.training and not model.bn.running_mean.any()


def test_aliased_and_tied_names_are_kept_apart_from_parameters():
    aliased = make("aliased_module")
    assert len(aliased.state_dict()) == 8 and len(list(aliased.parameters())) == 4
    tied = make("tied_linear")
    assert tied.first.weight is tied.second.weight
