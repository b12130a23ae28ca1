"""A captured model as a module: two graphs behind one `train()`, and copies that are equal and apart."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxsparse import CapturedModule, FxSparseError, InputError
from fxsparse.models.zoo import ZOO, call
from fxsparse.passes.trace import trace

CAPTURED = [name for name, case in ZOO.items() if case.refused is None]


def captured(name):
    torch.manual_seed(0)
    model = ZOO[name].make()
    return model, CapturedModule(trace(model, ZOO[name].example()))


def run(model, name, seed=0):
    torch.manual_seed(seed)
    return call(model, ZOO[name].example())


def round_trip(module, tmp_path):
    torch.save(module, tmp_path / "module.pt")
    return torch.load(tmp_path / "module.pt", weights_only=False)


COPIES = {
    "deepcopy": lambda module, tmp_path: copy.deepcopy(module),
    "pickle": lambda module, tmp_path: pickle.loads(pickle.dumps(module)),
    "save": round_trip,
    "twice": lambda module, tmp_path: copy.deepcopy(pickle.loads(pickle.dumps(module))),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_copies_compute_the_same_in_both_modes(name, assert_same, tmp_path):
    model, module = captured(name)
    module.train()
    ways = (
        ["deepcopy"] if name in ("weight_norm", "spectral_norm") else ["deepcopy", "save"]
    )  # torch pickles no parametrized module
    for twin in [COPIES[way](module, tmp_path) for way in ways]:
        assert type(twin).__mro__[1] is CapturedModule and twin.training
        own = copy.deepcopy(model)
        for step, mode in enumerate([True, False, True]):
            own.train(mode), twin.train(mode)
            assert_same(run(own, name, step), run(twin, name, step))
        assert list(twin.state_dict()) == list(module.state_dict())


@pytest.mark.parametrize("how", COPIES)
def test_copies_share_nothing_and_keep_ties(how, tmp_path):
    _, module = captured("tied_linear")
    twin = COPIES[how](module, tmp_path)
    assert twin.first.weight is twin.second.weight
    own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    assert not own & {id(tensor) for tensor in (*twin.parameters(), *twin.buffers())}
    assert not set(module.graph.nodes) & set(twin.graph.nodes)
    with torch.no_grad():
        twin.first.weight.zero_()
    assert module.first.weight.any()


def test_a_shallow_copy_shares_its_tensors():
    _, module = captured("mode_switch")
    twin = copy.copy(module)
    assert twin is not module and twin.head.weight is module.head.weight and twin.graph is not module.graph


def test_it_is_a_graph_module_over_the_models_own_tree():
    model, module = captured("unused")
    assert isinstance(module, fx.GraphModule)
    assert [name for name, _ in module.named_modules()] == [name for name, _ in model.named_modules()]
    assert list(module.state_dict()) == list(model.state_dict())
    assert dict(module.named_buffers()).keys() == dict(model.named_buffers()).keys()
    assert "scratch" not in module.state_dict()  # not persistent, as in the model


def test_graph_and_code_are_those_of_the_present_mode():
    _, module = captured("mode_switch")
    graphs = module.graphs
    assert graphs["train"] is not graphs["eval"]
    assert module.train().graph is graphs["train"] and "slow" in module.code and "fast" not in module.code
    assert module.eval().graph is graphs["eval"] and "fast" in module.code and "slow" not in module.code
    module.training = True  # as some training loops do
    assert module.graph is graphs["train"]


def test_replacing_a_graph_replaces_that_of_the_present_mode():
    x = torch.randn(4, 8)
    _, module = captured("mode_switch")
    expected = module.train()(x)
    doubled = copy.deepcopy(module.eval().graph)
    output = next(iter(doubled.find_nodes(op="output")))
    with doubled.inserting_before(output):
        output.args = (doubled.call_function(torch.mul, (output.args[0], 2)),)
    before = module(x)
    module.graph = doubled
    assert torch.equal(module(x), 2 * before) and torch.equal(module.train()(x), expected)
    _, module = captured("tied_linear")
    module.graph = copy.deepcopy(module.graph)
    assert module.graphs["train"] is module.graphs["eval"]


def test_changing_a_graph_in_place_needs_recompile():
    _, module = captured("tied_linear")
    x = torch.randn(4, 8)
    before = module(x)
    (output,) = module.graph.find_nodes(op="output")
    with module.graph.inserting_before(output):
        output.args = (module.graph.call_function(torch.neg, (output.args[0],)),)
    assert torch.equal(module(x), before)
    module.recompile()
    assert torch.equal(module(x), -before) and torch.equal(module.eval()(x), -before)
    assert torch.equal(copy.deepcopy(module)(x), -before)


def test_plain_attributes_and_constants_come_along(assert_same):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.classes, self.scale = nn.Linear(8, 3), ["a", "b", "c"], torch.tensor(2.0)

        def forward(self, x):
            return self.fc(x) * self.scale + torch.from_numpy(np.arange(3, dtype=np.float32))

    model, x = Net(), torch.randn(4, 8)
    module = CapturedModule(trace(model, x))
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.classes == ["a", "b", "c"]
        assert_same(model(x), twin(x))
        assert list(twin.state_dict()) == ["fc.weight", "fc.bias"]


def test_errors_for_other_sizes_name_the_node():
    _, module = captured("tied_linear")
    with pytest.raises(InputError, match=r"node linear in first fails for \(4, 5\)") as info:
        module(torch.randn(4, 5))
    assert "shapes cannot be multiplied" in str(info.value) and isinstance(info.value, RuntimeError)


def test_errors_for_the_examples_sizes_are_torchs_own():
    _, module = captured("tied_linear")
    module.get_submodule("first").weight.data = torch.randn(3, 3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as info:
        module(torch.randn(4, 8))
    assert not isinstance(info.value, FxSparseError)


def test_train_and_eval_return_the_module_and_reach_every_submodule():
    for name in ("frozen_batch_norm", "auxiliary_head", "called_in_loop"):
        model, module = captured(name)
        for mode in (False, True, True, False):
            assert module.train(mode) is module
            model.train(mode)
            flags = {key: part.training for key, part in model.named_modules()}
            assert {key: part.training for key, part in module.named_modules()} == flags


def test_functions_that_pickle_does_not_find_are_saved_by_name():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return F.max_pool2d(self.conv(x), 2)

    x = torch.randn(2, 3, 8, 8)
    module = CapturedModule(trace(Pooled(), x))
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))
