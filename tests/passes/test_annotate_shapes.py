"""Every node knows its shape, dtype and stride, and finding out costs no arithmetic and changes nothing."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxsparse
from fxsparse.core.records import TensorSpec, record_of
from fxsparse.models.zoo import ZOO
from fxsparse.passes.annotate_shapes import annotate_shapes
from fxsparse.passes.trace import trace

CAPTURED = [name for name, case in ZOO.items() if case.refused is None]


class Recorder(fx.Interpreter):
    """Runs a graph for real and notes what every node gave."""

    def __init__(self, root, graph):
        super().__init__(root, graph=graph)
        self.seen = {}

    def run_node(self, n):
        value = super().run_node(n)
        self.seen[n] = _comparable(value)  # now, since later nodes may change it in place
        return value


@pytest.mark.parametrize("name", CAPTURED)
def test_annotations_are_what_running_gives(name):
    torch.manual_seed(0)
    case = ZOO[name]
    captured = trace(case.make(), case.example())
    annotate_shapes(captured)
    example = case.example()
    args = example if isinstance(example, tuple) else () if isinstance(example, dict) else (example,)
    for mode, graph in captured.distinct_graphs():
        placeholders = graph.find_nodes(op="placeholder")
        if isinstance(example, dict) or any(str(node.target).startswith("*") for node in placeholders):
            continue  # an Interpreter binds no keywords; the shapes of those are in the other tests
        captured.model.train(mode == "train")
        recorder = Recorder(captured.model, graph)
        recorder.run(*args, *[node.args[0] if node.args else None for node in placeholders[len(args) :]])
        for node, expected in recorder.seen.items():
            assert _comparable(record_of(node).spec) == expected, node.format_node()


def _comparable(value):
    """Plain data: tensors and their records as shape, dtype and stride, objects as their attributes."""

    def plain(leaf):
        if isinstance(leaf, Tensor):
            return tuple(leaf.shape), leaf.dtype, leaf.stride()
        if isinstance(leaf, TensorSpec):
            return leaf.shape, leaf.dtype, leaf.stride
        return {key: plain(item) for key, item in vars(leaf).items()} if hasattr(leaf, "__dict__") else leaf

    return pytree.tree_map(plain, value)


def test_nothing_is_computed_or_changed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 3)).train()
    captured = trace(model, torch.randn(2, 3, 8, 8))
    state = {key: value.clone() for key, value in captured.model.state_dict().items()}
    versions = [tensor._version for tensor in (*captured.model.parameters(), *captured.model.buffers())]
    flags = [module.training for module in captured.model.modules()]
    randomness = torch.get_rng_state()
    annotate_shapes(captured)
    assert all(torch.equal(value, state[key]) for key, value in captured.model.state_dict().items())
    assert versions == [tensor._version for tensor in (*captured.model.parameters(), *captured.model.buffers())]
    assert flags == [module.training for module in captured.model.modules()]
    assert torch.equal(randomness, torch.get_rng_state())


def test_a_model_too_large_for_memory_is_annotated_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1 << 16, 1 << 20), nn.ReLU(), nn.Linear(1 << 20, 10))  # 256 GiB
        sparse = fxsparse.sparsify(model, torch.randn(4, 1 << 16), sparsity=0.9, distribution="uniform")
    nodes = {node.name: record_of(node).spec for node in sparse.graph.nodes}
    shapes = {site.name: nodes[site.uses[0].node] for site in sparse.sites}
    assert shapes["0.weight"].shape == (4, 1 << 20) and shapes["2.weight"].shape == (4, 10)
    assert shapes["0.weight"].device.type == "meta"


def test_the_copies_of_a_module_keep_the_annotations():
    sparse = fxsparse.sparsify(nn.Sequential(nn.Linear(8, 3)), torch.randn(4, 8))
    expected = [record_of(node) for node in sparse.graph.nodes]
    assert all(record_of(node).spec is not None for node in sparse.graph.nodes if node.target is F.linear)
    for twin in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert [record_of(node) for node in twin.graph.nodes] == expected
