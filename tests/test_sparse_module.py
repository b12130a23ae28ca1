"""The masked module: state, copies, checkpoints, folding, the way back, and `torch.compile`."""

import copy
import pickle
import types

import pytest
import torch
import torchvision
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import fxsparse
from fxsparse import CapturedModule, SparseModule, apply_mask
from fxsparse.models import small_resnet
from fxsparse.models.zoo import ZOO, call

CAPTURED = [name for name, case in ZOO.items() if case.refused is None]
SAMPLE = ["tied_linear", "tied_embedding", "mode_switch", "aliased_module", "unused", "running_counter", "unrolled_gru"]


def sparse_zoo(name, sparsity=0.5, **options):
    torch.manual_seed(0)
    model = ZOO[name].make()
    options = {"distribution": "uniform", "verify": False} | options
    return model, fxsparse.sparsify(model, ZOO[name].example(), sparsity=sparsity, **options)


def run(model, name, seed=0):
    torch.manual_seed(seed)
    return call(model, ZOO[name].example())


def saved_and_loaded(sparse, tmp_path):
    torch.save(sparse, tmp_path / "sparse.pt")
    return torch.load(tmp_path / "sparse.pt", weights_only=False)


COPIES = {
    "deepcopy": lambda sparse, tmp_path: copy.deepcopy(sparse),
    "pickle": lambda sparse, tmp_path: pickle.loads(pickle.dumps(sparse)),
    "save": saved_and_loaded,
}


# -- masks and weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLE)
def test_masks_are_exact_and_weights_zero_outside(name):
    _, sparse = sparse_zoo(name, sparsity=0.3)
    first = sparse.sites[0]
    for site in sparse.sites:
        mask, weight = sparse.masks[site.name], sparse.get_parameter(site.name)
        assert mask.dtype == torch.bool and mask.shape == weight.shape == site.shape
        removed = 0 if site is first else int(0.3 * site.numel + 1e-9)  # uniform: the first stays dense
        assert int((~mask).sum()) == removed
        assert (weight[~mask] == 0).all() and (weight[mask] != 0).any()
    assert sparse.active_counts == {site.name: int(sparse.masks[site.name].sum()) for site in sparse.sites}
    total = sum(site.numel for site in sparse.sites)
    assert sparse.sparsity == pytest.approx(1 - sum(sparse.active_counts.values()) / total)
    assert list(sparse.masks) == list(sparse.densities) == [site.name for site in sparse.sites]


def test_masks_depend_on_seed_and_name_alone():
    _, first = sparse_zoo("dense_concat")
    torch.rand(7)
    _, second = sparse_zoo("dense_concat", exclude="layers.0")
    _, other = sparse_zoo("dense_concat", seed=1)
    for name, mask in second.masks.items():
        assert torch.equal(mask, first.masks[name]) or second.densities[name] == 1.0
    assert any(not torch.equal(mask, other.masks[name]) for name, mask in first.masks.items())


def test_active_weights_are_the_models_own():
    model, sparse = sparse_zoo("dense_concat")
    for name, mask in sparse.masks.items():
        assert torch.equal(sparse.get_parameter(name), model.get_parameter(name) * mask)


def test_the_mapping_of_masks_is_read_only():
    _, sparse = sparse_zoo("called_twice")
    with pytest.raises(TypeError):
        sparse.masks["stem.weight"] = torch.ones(3)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5])
def test_sparsity_outside_its_range(sparsity):
    with pytest.raises(fxsparse.AllocationError, match=r"outside \[0, 1\)"):
        sparse_zoo("called_twice", sparsity=sparsity)


# -- copies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_equal_and_apart(name, how, assert_same, tmp_path):
    include = {"include": "*"} if name == "tied_embedding" else {}
    model, sparse = sparse_zoo(name, **include)
    sparse.train()
    twin = COPIES[how](sparse, tmp_path)
    assert isinstance(twin, SparseModule) and twin.sites == sparse.sites and twin.uncovered == sparse.uncovered
    assert list(twin.state_dict()) == list(sparse.state_dict())
    for step, mode in enumerate([True, False, True]):
        expected = run(copy.deepcopy(sparse).train(mode), name, step)
        assert_same(expected, run(copy.deepcopy(twin).train(mode), name, step))
    for key, mask in sparse.masks.items():
        assert torch.equal(mask, twin.masks[key]) and mask is not twin.masks[key]
    ties = {key: parameter.data_ptr() for key, parameter in model.named_parameters(remove_duplicate=False)}
    own = {key: parameter.data_ptr() for key, parameter in twin.named_parameters(remove_duplicate=False)}
    for key, pointer in ties.items():
        assert [k for k, p in ties.items() if p == pointer] == [k for k, p in own.items() if p == own[key]]
    twin.masks[sparse.sites[-1].name].fill_(False)
    assert sparse.masks[sparse.sites[-1].name].any()


def test_a_copy_of_a_copy_trains_on_its_own():
    _, sparse = sparse_zoo("tied_linear")
    twin = copy.deepcopy(copy.deepcopy(sparse))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    rewirer = twin.attach(optimizer, total_steps=8)
    run(twin, "tied_linear").sum().backward()
    optimizer.step()
    assert rewirer.step_count == 1
    assert not torch.equal(twin.first.weight, sparse.first.weight)
    assert (twin.first.weight[~twin.masks["first.weight"]] == 0).all()


def test_a_copy_of_an_attached_module_is_not_attached():
    _, sparse = sparse_zoo("called_twice")
    sparse.attach(torch.optim.SGD(sparse.parameters(), lr=0.1), total_steps=8)
    sparse.dense_gradient = True
    twin = copy.deepcopy(sparse)
    assert twin.dense_gradient is False
    twin.attach(torch.optim.SGD(twin.parameters(), lr=0.1), total_steps=8)
    with pytest.raises(fxsparse.RuntimeStateError):
        sparse.attach(torch.optim.SGD(sparse.parameters(), lr=0.1), total_steps=8)


# -- state dicts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAPTURED)
def test_state_dicts_round_trip(name, assert_same):
    _, sparse = sparse_zoo(name)
    _, other = sparse_zoo(name, seed=1)
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.mul_(1.5)
    other.load_state_dict(sparse.state_dict())
    for key, value in sparse.state_dict().items():
        assert_same(value, other.state_dict()[key])
    assert_same(run(sparse.eval(), name), run(other.eval(), name))


@pytest.mark.parametrize("name", SAMPLE)
def test_a_dense_checkpoint_loads_with_only_masks_missing(name):
    _, sparse = sparse_zoo(name)
    masks = {key: mask.clone() for key, mask in sparse.masks.items()}
    torch.manual_seed(5)
    dense = ZOO[name].make().state_dict()
    result = sparse.load_state_dict(dense, strict=False)
    assert result.unexpected_keys == []
    assert set(result.missing_keys) == {key for key in sparse.state_dict() if key.endswith("_mask")}
    for key, mask in masks.items():
        assert torch.equal(sparse.masks[key], mask)
        assert torch.equal(sparse.get_parameter(key), dense[key] * mask)
    with pytest.raises(RuntimeError, match="Missing key"):
        sparse.load_state_dict(dense)


def test_loading_by_assignment():
    _, sparse = sparse_zoo("called_twice")
    _, other = sparse_zoo("called_twice", seed=1)
    other.load_state_dict({key: value.clone() for key, value in sparse.state_dict().items()}, assign=True)
    for key, mask in sparse.masks.items():
        assert torch.equal(other.masks[key], mask) and (other.get_parameter(key)[~mask] == 0).all()


# -- folding and the way back -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAPTURED)
def test_a_folded_module_has_the_models_keys_and_the_sparse_modules_outputs(name, assert_same):
    model, sparse = sparse_zoo(name)
    before = {key: value.clone() for key, value in sparse.state_dict().items()}
    folded = sparse.fold()
    assert isinstance(folded, CapturedModule) and not isinstance(folded, SparseModule)
    assert list(folded.state_dict()) == list(model.state_dict())
    assert not any(node.target is apply_mask for graph in folded.graphs.values() for node in graph.nodes)
    assert not {"sites", "dense_gradient", "method", "_rewirer"} & vars(folded).keys()
    for mode in (True, False):
        assert_same(run(copy.deepcopy(sparse).train(mode), name), run(folded.train(mode), name))
        folded = sparse.fold()
    assert (folded.graphs["train"] is folded.graphs["eval"]) == (sparse.graphs["train"] is sparse.graphs["eval"])
    assert all(torch.equal(value, before[key]) for key, value in sparse.state_dict().items())
    assert not {id(p) for p in folded.parameters()} & {id(p) for p in sparse.parameters()}


@pytest.mark.parametrize("name", CAPTURED)
def test_copy_to_the_users_model(name, assert_same):
    model, sparse = sparse_zoo(name)
    run(sparse.train(), name)  # moves buffers
    assert sparse.copy_to(model) is model
    assert_same(run(model.eval(), name), run(copy.deepcopy(sparse).eval(), name))
    for key, mask in sparse.masks.items():
        assert (model.get_parameter(key)[~mask] == 0).all()


def test_copy_to_another_model_is_refused():
    _, sparse = sparse_zoo("called_twice")
    with pytest.raises(RuntimeError):
        sparse.copy_to(nn.Linear(8, 8))


# -- moving -----------------------------------------------------------------------------------------------


def test_dtypes_change_and_masks_stay_bool():
    model, sparse = sparse_zoo("squeeze_excite")
    sparse.double()
    assert all(mask.dtype == torch.bool for mask in sparse.masks.values())
    x = ZOO["squeeze_excite"].example().double()
    eager = model.double()
    with torch.no_grad():
        for name, mask in sparse.masks.items():
            eager.get_parameter(name).mul_(mask)
    assert torch.equal(sparse(x), eager(x))


def test_a_module_on_meta_is_filled_later():
    with torch.device("meta"):
        model = small_resnet()
        sparse = fxsparse.sparsify(model, torch.randn(2, 1, 8, 8), sparsity=0.8)
    assert all(mask.is_meta for mask in sparse.masks.values())
    torch.manual_seed(0)
    real = small_resnet()
    loaded = fxsparse.sparsify(real, torch.randn(2, 1, 8, 8), sparsity=0.8)
    sparse.to_empty(device="cpu").load_state_dict(loaded.state_dict())
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(sparse.eval()(x), loaded.eval()(x))


# -- torch.compile ----------------------------------------------------------------------------------------


BACKENDS = {"eager": lambda graph, inputs: graph.forward, "aot_eager": aot_eager}


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self, backend=BACKENDS["eager"]):
        self.graphs, self.backend = [], backend

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return self.backend(graph, inputs)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tied_mlp():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.second.weight = self.first.weight

        def forward(self, x, scale=None):
            x = torch.relu(self.second(torch.relu(self.first(x)) * self.training))
            if x.shape[0] > 2:
                x = x * 2
            return self.head(x if scale is None else x * scale)

    return Net(), torch.randn(4, 8)


@pytest.mark.parametrize(
    "make", [tied_mlp, lambda: (small_resnet(), torch.randn(4, 1, 8, 8))], ids=["tied mlp", "resnet"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_it_is_two_graphs_and_stays_two(make, backend, fresh_dynamo):
    """One for ordinary steps and one for update steps, while masks and weights change in place."""
    torch.manual_seed(0)
    model, x = make()
    sparse = fxsparse.sparsify(model, x, sparsity=0.5).train()
    twin = copy.deepcopy(sparse)
    counting = Counting(BACKENDS[backend])
    compiled = torch.compile(sparse, fullgraph=True, backend=counting)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for dense in (False, False, True, False, True, True, False, False):
        for module, forward in ((sparse, compiled), (twin, twin)):
            module.zero_grad()
            module.dense_gradient = dense
            forward(x).square().sum().backward()
        for name, mask in sparse.masks.items():
            gradient = sparse.get_parameter(name).grad
            torch.testing.assert_close(gradient, twin.get_parameter(name).grad)
            assert dense or (gradient[~mask] == 0).all()
        if dense:
            assert any((sparse.get_parameter(name).grad[~mask] != 0).any() for name, mask in sparse.masks.items())
            for name, mask in sparse.masks.items():
                shuffled = mask.view(-1)[torch.randperm(mask.numel(), generator=generator)].view(mask.shape)
                mask.copy_(shuffled), twin.masks[name].copy_(shuffled)
            sparse.apply_masks_(), twin.apply_masks_()
        with torch.no_grad():
            for module in (sparse, twin):
                for parameter in module.parameters():
                    parameter.sub_(0.01 * parameter.grad) if not dense else None
        seen.append(len(counting.graphs))
    assert seen == [1, 1, 2, 2, 2, 2, 2, 2]


def test_compiled_train_and_eval_are_a_graph_each(fresh_dynamo):
    _, sparse = sparse_zoo("auxiliary_head")
    counting = Counting()
    compiled = torch.compile(sparse, fullgraph=True, backend=counting)
    x = ZOO["auxiliary_head"].example()
    for mode in (True, False, True, False):
        compiled.train(mode)
        out = compiled(x)
        assert isinstance(out, tuple) == mode
    assert len(counting.graphs) == 2


def test_an_attached_run_under_compile_rewires_as_without(fresh_dynamo):
    def trained(wrap):
        torch.manual_seed(0)
        model, x = tied_mlp()
        sparse = fxsparse.sparsify(model, x, sparsity=0.5, update_interval=2)
        forward = wrap(sparse)
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9)
        rewirer = sparse.attach(optimizer, total_steps=12)
        for _ in range(12):
            optimizer.zero_grad()
            forward(x).square().mean().backward()
            optimizer.step()
        return sparse, rewirer

    counting = Counting()
    plain, log = trained(lambda sparse: sparse)
    compiled, other = trained(lambda sparse: torch.compile(sparse, fullgraph=True, backend=counting))
    assert log.history == other.history and len(log.history) == 4
    assert len(counting.graphs) == 2
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[key], value)


# -- reports ----------------------------------------------------------------------------------------------


def test_the_report_lists_every_site_and_everything_without_a_mask():
    _, sparse = sparse_zoo("module_gru")
    text = sparse.report()
    assert "head.weight" in text and "gru.weight_hh_l1" in text and "embedding.weight 12x8: an embedding table" in text
    assert "one graph for both modes" in sparse_zoo("attention")[1].report()
    assert "a graph for each mode" in sparse_zoo("mode_switch")[1].report()


def test_the_report_suggests_to_leave_depthwise_convolutions_dense():
    model, x = ZOO["depthwise_separable"].make(), ZOO["depthwise_separable"].example()
    hint = "note: 1 depthwise weights are sparse; exclude=('depthwise', 'first') keeps them dense"
    assert hint in fxsparse.sparsify(model, x, distribution={"*": 0.5}).report()
    assert "depthwise weights" not in fxsparse.sparsify(model, x, sparsity=0.5, exclude=("depthwise", "first")).report()
    assert "depthwise weights" not in sparse_zoo("called_twice")[1].report()


def test_the_report_says_how_a_weight_is_computed():
    text = sparse_zoo("weight_standardization")[1].report()
    assert "conv2d (computed by truediv, where zeros do not stay)" in text
    assert "note: conv2d: zeros of conv.weight are none after truediv" in text


def test_notes_are_warned_and_reported():
    model = types.SimpleNamespace(make=ZOO["attribute_cache"].make)
    with pytest.warns(fxsparse.FxSparseWarning, match="forward changes features"):
        sparse = fxsparse.sparsify(model.make(), ZOO["attribute_cache"].example())
    assert "note: forward changes features" in sparse.report()


def test_weights_are_copied_to_a_model_whose_state_has_a_version():
    model = torchvision.models.mnasnet0_5()  # loads no state without one
    sparse = fxsparse.sparsify(model, torch.randn(2, 3, 32, 32), verify=False)
    assert torch.equal(sparse.copy_to(model).layers[0].weight, sparse.layers[0].weight)
