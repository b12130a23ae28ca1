"""Copying, pickling, saving and loading: the same function, the same ties, the same keys."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torchvision
from torch import nn

import fxsparse
from fxsparse import models
from fxsparse.models.zoo import ZOO, call, tensors


def saved_and_loaded(sparse):
    buffer = io.BytesIO()
    torch.save(sparse, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda sparse: pickle.loads(pickle.dumps(sparse)),
    "torch.save": saved_and_loaded,
}

CASES = [name for name, case in ZOO.items() if case.refused is None]


def sparsify(name, **options):
    torch.manual_seed(0)
    model = ZOO[name].make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxsparse.FxSparseWarning)
        return model, fxsparse.sparsify(model, ZOO[name].example(), sparsity=0.5, verify=False, **options)


def outputs(module, name, mode):
    module.train(mode == "train")
    torch.manual_seed(3)
    return list(tensors(call(module, ZOO[name].example())))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_computes_the_same_in_both_modes_and_shares_nothing(kind, name):
    if kind != "deepcopy" and name == "weight_norm":
        pytest.skip("torch cannot pickle parametrized modules")
    _, sparse = sparsify(name)
    own = COPIES[kind](sparse)
    assert list(own.state_dict()) == list(sparse.state_dict())
    assert [site.name for site in own.sites] == [site.name for site in sparse.sites]
    state = copy.deepcopy(sparse.state_dict())
    for mode in ("eval", "train", "eval"):
        expected = outputs(sparse, name, mode)
        actual = outputs(own, name, mode)
        assert len(expected) == len(actual)
        for wanted, got in zip(expected, actual, strict=True):
            assert torch.equal(wanted, got), mode
    sparse.load_state_dict(state)
    own.load_state_dict(state)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(1.0)
    for key, value in sparse.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("kind", COPIES)
def test_tied_parameters_stay_tied_and_trainable(kind):
    _, sparse = sparsify("tied_linear")
    own = COPIES[kind](sparse)
    (site,) = [site for site in own.sites if site.aliases]
    for alias in site.aliases:
        assert own.get_parameter(alias) is own.get_parameter(site.name)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    rewirer = own.attach(optimizer, total_steps=400)
    for _ in range(102):
        optimizer.zero_grad()
        sum(t.square().mean() for t in tensors(call(own, ZOO["tied_linear"].example()))).backward()
        optimizer.step()
    assert len(rewirer.history) == 1
    for alias in site.aliases:
        assert own.get_parameter(alias) is own.get_parameter(site.name)


def test_copying_while_attached_leaves_the_runtime_behind():
    _, sparse = sparsify("tied_linear", update_interval=1)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer, total_steps=10)
    sparse.dense_gradient = True
    for make in COPIES.values():
        own = make(sparse)
        assert own.dense_gradient is False
        own.attach(torch.optim.SGD(own.parameters(), lr=0.1), total_steps=10)


def test_a_dense_checkpoint_loads_with_only_masks_missing():
    torch.manual_seed(0)
    trained, fresh = torchvision.models.resnet18(num_classes=4), torchvision.models.resnet18(num_classes=4)
    sparse = fxsparse.sparsify(fresh, torch.randn(2, 3, 64, 64), sparsity=0.8)
    masks = {name: mask.clone() for name, mask in sparse.masks.items()}
    missing, unexpected = sparse.load_state_dict(trained.state_dict(), strict=False)
    assert unexpected == []
    assert missing == [key for key in sparse.state_dict() if key.endswith("_mask")]
    assert len(missing) == len(sparse.sites) == 21
    for name, mask in sparse.masks.items():
        assert torch.equal(mask, masks[name])
        assert torch.equal(sparse.get_parameter(name), trained.get_parameter(name) * mask)
    with pytest.raises(RuntimeError, match="_mask"):
        sparse.load_state_dict(trained.state_dict())


def test_a_sparse_checkpoint_carries_its_masks():
    first = fxsparse.sparsify(models.small_resnet(), torch.randn(2, 1, 8, 8), sparsity=0.8, seed=1)
    second = fxsparse.sparsify(models.small_resnet(), torch.randn(2, 1, 8, 8), sparsity=0.5, seed=2)
    second.load_state_dict(first.state_dict())
    assert second.sparsity == first.sparsity
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(first.eval()(x), second.eval()(x))


@pytest.mark.parametrize("name", CASES)
def test_fold_and_copy_to_give_the_sparse_function_under_the_models_keys(name):
    model, sparse = sparsify(name)
    folded = sparse.fold()
    assert list(folded.state_dict()) == list(model.state_dict())
    assert not any(node.target is fxsparse.apply_mask for graph in folded.graphs.values() for node in graph.nodes)
    back = sparse.copy_to(copy.deepcopy(model))
    states = [(module, copy.deepcopy(module.state_dict())) for module in (sparse, folded, back)]
    for mode in ("eval", "train"):
        for module, state in states:
            module.load_state_dict(state)
        expected = outputs(sparse, name, mode)
        for module in (folded, back):
            for wanted, got in zip(expected, outputs(module, name, mode), strict=True):
                assert torch.equal(wanted, got), mode
    for site in sparse.sites:
        mask = sparse.masks[site.name]
        assert (back.get_parameter(site.name)[~mask] == 0).all()
        assert (folded.get_parameter(site.name)[~mask] == 0).all()


def test_masks_change_in_place_and_the_output_follows():
    sparse = fxsparse.sparsify(
        nn.Linear(4, 2, bias=False), torch.randn(1, 4), sparsity=0.5, distribution={"weight": 0.5}
    )
    with torch.no_grad():
        sparse.weight.fill_(1.0)
    before = sparse.masks["weight"]
    before.fill_(False)
    before[0, 3] = True
    assert sparse(torch.tensor([[1.0, 2.0, 4.0, 8.0]])).tolist() == [[8.0, 0.0]]
    assert sparse.masks["weight"] is before
    assert sparse.sparsity == 7 / 8
    assert sparse.densities == {"weight": 1 / 8}
    with pytest.raises(TypeError):
        sparse.masks["weight"] = before
