"""Every network of the zoo, captured and masked, is still the network that its class writes down."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import fxsparse
from fxsparse.models.zoo import ZOO, call, tensors

CAPTURED = [name for name, case in ZOO.items() if case.refused is None]
ALL = pytest.mark.parametrize("name", CAPTURED)

EXPORT_REFUSES = {"dataclass_io"}
"""An object of a class of the user's among the arguments: `torch.export` wants its class registered."""

EXPORTED_QUICKLY = set(
    """tied_transpose called_twice aliased_module unused lazy_linear padding_modes weight_norm auxiliary_head
    functional_dropout frozen_batch_norm tuple_io namedtuple_io keyword_variadic none_input inplace_slice
    discarded_batch_norm running_mean attention no_grad_region assigned_buffer vmapped""".split()
)
"""The others are exported too where the long tests run."""

BY_EXPORT = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in EXPORTED_QUICKLY else pytest.mark.slow)
        for name in CAPTURED
        if name not in EXPORT_REFUSES
    ],
)

DECIDED_BY_BATCH = {"length_loop", "tensor_iteration"}
"""Their forward loops over the batch in Python, so that a graph holds for one batch size."""


def make(name):
    torch.manual_seed(0)
    return ZOO[name].make()


def sparsify(name, model, sparsity, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxsparse.FxSparseWarning)
        return fxsparse.sparsify(model, ZOO[name].example(), sparsity=sparsity, **options)


def run(model, example, seed=0):
    torch.manual_seed(seed)
    return call(model, copy.deepcopy(example))


def backward(output):
    """Gradients of a loss in which every output takes part with weights of its own."""
    trained = [tensor for tensor in tensors(output) if tensor.requires_grad]
    sum((tensor * torch.linspace(0.5, 1.5, tensor.numel()).view(tensor.shape)).sum() for tensor in trained).backward()


def masked_copy(model, sparse):
    """An eager copy whose weights are multiplied by the masks."""
    eager = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in sparse.masks.items():
            eager.get_parameter(name).mul_(mask)
    return eager


@ALL
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_outputs_gradients_and_buffers_equal_eager(name, sparsity, assert_same):
    model = make(name)
    sparse = sparsify(name, model, sparsity, distribution="uniform", verify=False)
    trains_as_eager(name, model, sparse, assert_same)


@BY_EXPORT
def test_an_exported_capture_equals_eager(name, assert_same):
    model = make(name)
    sparse = sparsify(name, model, 0.5, distribution="uniform", verify=False, capture="export")
    assert (sparse.capture == "export" and len(sparse.sites) == ZOO[name].sites) or name in DETACHED
    assert [key for key in sparse.state_dict() if not key.endswith("_mask")] == list(model.state_dict())
    trains_as_eager(name, model, sparse, assert_same)
    for step, mode in enumerate([True, False, False, True]):
        model.train(mode), sparse.train(mode)
        for key, buffer in model.named_buffers():
            sparse.get_buffer(key).copy_(buffer)
        eager = masked_copy(model, sparse)
        assert_same(run(eager, ZOO[name].example(), step), run(sparse, ZOO[name].example(), step))


DETACHED = {"no_grad_region"}
"""A weight whose operand is detached has no gradient; export names it as left out, the tracer detaches the result."""


def trains_as_eager(name, model, sparse, assert_same):
    eager = masked_copy(model, sparse)
    for mode in (False, True):
        eager.zero_grad(), sparse.zero_grad()
        eager.train(mode), sparse.train(mode)
        for step in range(2):  # BatchNorm statistics and counters move between the calls
            expected, actual = run(eager, ZOO[name].example(), step), run(sparse, ZOO[name].example(), step)
            assert_same(expected, actual)
        backward(expected)
        backward(actual)
        parameters, buffers = dict(sparse.named_parameters()), dict(sparse.named_buffers())
        for key, parameter in eager.named_parameters():
            gradient = parameter.grad
            if gradient is not None and key in sparse.masks:
                gradient = gradient * sparse.masks[key]
            assert_same(gradient, parameters[key].grad)
        for key, buffer in eager.named_buffers():
            assert_same(buffer, buffers[key])


def test_masks_of_one_half_are_not_trivial():
    for name in ("called_twice", "tied_linear", "unrolled_gru"):
        sparse = sparsify(name, make(name), 0.5)
        assert 0.3 < sparse.sparsity < 0.6
        assert any(density not in (0.0, 1.0) for density in sparse.densities.values())


@ALL
def test_modes_switch_as_in_eager(name, assert_same):
    model = make(name)
    sparse = sparsify(name, model, 0.0, verify=False)
    for step, mode in enumerate([True, False, False, True, False, True]):
        assert model.train(mode) is model and sparse.train(mode) is sparse
        assert sparse.training == model.training
        assert_same(run(model, ZOO[name].example(), step), run(sparse, ZOO[name].example(), step))
    own = dict(sparse.named_modules())
    assert all(own[key].training == module.training for key, module in model.named_modules())


@ALL
def test_sites_and_keys(name):
    """As many sites as counted by hand; the model's keys in the model's order, and the masks'."""
    model = make(name)
    sparse = sparsify(name, model, 0.5)
    assert len(sparse.sites) == ZOO[name].sites
    assert {site.mask_name for site in sparse.sites} <= set(sparse.state_dict())
    assert [key for key in sparse.state_dict() if not key.endswith("_mask")] == list(model.state_dict())
    assert [key for key, _ in sparse.named_parameters()] == [key for key, _ in model.named_parameters()]


@ALL
def test_the_users_model_is_untouched(name):
    model = make(name)
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    before, randomness = picture(model), (random.getstate(), str(np.random.get_state()), torch.get_rng_state())
    sparse = sparsify(name, model, 0.5)
    after = (random.getstate(), str(np.random.get_state()), torch.get_rng_state())
    assert randomness[:2] == after[:2] and torch.equal(randomness[2], after[2])
    assert picture(model) == before
    own = {id(p) for p in model.parameters()} | {id(b) for b in model.buffers()} | {id(m) for m in model.modules()}
    assert not own & {id(p) for p in (*sparse.parameters(), *sparse.buffers(), *sparse.modules())}


def picture(model):
    """All that a module is, by identity where that matters and by value for what tensors hold."""
    state = {key: value.tolist() for key, value in model.state_dict().items()}
    modules = []
    for key, module in model.named_modules():
        attributes = {name: id(value) for name, value in module.__dict__.items()}
        lengths = {name: len(value) for name, value in module.__dict__.items() if isinstance(value, (dict, list))}
        held = {name: id(t) for name, t in (*module._parameters.items(), *module._buffers.items())}
        modules.append((key, id(module), type(module), attributes, lengths, held, module.training))
    gradients = [p.grad is None for p in model.parameters()]
    return state, modules, gradients, model.forward.__func__


@ALL
@pytest.mark.parametrize("batch", [1, 3])
def test_other_batch_sizes(name, batch, assert_same):
    example = resized(ZOO[name].example(), batch)
    model = make(name).eval()
    sparse = sparsify(name, model, 0.0, verify=False).eval()
    expected = run(model, example)
    if name in DECIDED_BY_BATCH:
        with pytest.raises(fxsparse.InputError, match=r"shapes\.py:\d+: `.*` meets [13] where the example gave [24]"):
            run(sparse, example)
    else:
        assert_same(expected, run(sparse, example))


@BY_EXPORT
@pytest.mark.parametrize("batch", [1, 3])
def test_other_batch_sizes_of_an_exported_capture(name, batch, assert_same):
    """As eager, or an error of ours that names the input; few are refused, and only for sizes that decide."""
    example = resized(ZOO[name].example(), batch)
    model = make(name).eval()
    sparse = sparsify(name, model, 0.0, verify=False, capture="export").eval()
    expected = run(model, example)
    try:
        actual = run(sparse, example)
    except fxsparse.InputError as error:
        assert name in (DECIDED_BY_BATCH | NOT_ALONE if batch == 1 else DECIDED_BY_BATCH), error
        assert "argument" in str(error) or ".shape[" in str(error)
    else:
        assert_same(expected, actual)


NOT_ALONE = set("padding_modes inplace_slice module_gru module_lstm cell_loop transformer_layer attention".split())
"""Exported with a batch of two or more, an operation of theirs takes another way for a batch of one."""


def resized(example, batch):
    def leaf_of(leaf):
        return torch.cat([leaf, leaf.flip(-1)])[:batch] if isinstance(leaf, Tensor) and leaf.ndim else leaf

    return pytree.tree_map(leaf_of, example)
