"""Tracing: a copy, in both modes, by the first mechanism that can."""

import pytest
import torch
from torch import fx, nn

import fxsparse
from fxsparse.core.records import META_KEY, record_of
from fxsparse.models.zoo import ZOO
from fxsparse.passes import trace as trace_pass
from fxsparse.passes.trace import OneMode, split_example, trace

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))

ONE_GRAPH = {"tied_linear", "grouped_conv", "called_in_loop", "discarded_batch_norm", "frozen_batch_norm", "dict_io"}
TWO_GRAPHS = {"auxiliary_head", "mode_switch", "functional_dropout", "stochastic_depth", "random_noise", "running_mean"}


@pytest.mark.parametrize("name", sorted(ONE_GRAPH | TWO_GRAPHS))
def test_modes_share_a_graph_unless_they_differ(name):
    captured = trace(ZOO[name].make(), ZOO[name].example())
    assert (captured.graphs["train"] is captured.graphs["eval"]) == (name in ONE_GRAPH)
    assert [mode for mode, _ in captured.distinct_graphs()] == (["eval"] if name in ONE_GRAPH else ["eval", "train"])


def test_it_works_on_a_copy_in_the_modes_of_the_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout()).train()
    model[1].eval()
    captured = trace(model, X)
    assert captured.name == "Sequential" and captured.model is not model and captured.mechanism == "concrete"
    assert [module.training for module in captured.model.modules()] == [True, True, False, True]
    assert not {id(p) for p in captured.model.parameters()} & {id(p) for p in model.parameters()}
    assert captured.example[0][0].shape == (2, 8) and captured.example[1] == {}


def test_nodes_know_the_module_that_made_them():
    captured = trace(ZOO["mode_switch"].make(), ZOO["mode_switch"].example())
    layers = {
        mode: [record_of(node).module for node in graph.nodes if node.target is nn.functional.linear]
        for mode, graph in captured.graphs.items()
    }
    assert layers == {"train": ["branch.slow", "head"], "eval": ["branch.fast", "head"]}
    assert all(set(node.meta) == {META_KEY} for graph in captured.graphs.values() for node in graph.nodes)


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


def test_weightless_modules_stay_calls_and_weights_are_operands():
    features = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Swish(), nn.Sequential(nn.Dropout(), nn.ReLU())
    model = nn.Sequential(*features, nn.Flatten(), nn.Linear(144, 3))
    graph = trace(model, torch.randn(2, 3, 8, 8)).graphs["eval"]
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["1", "2", "3", "4"]
    operands = [node.args[1].target for node in graph.nodes if node.target in (torch.conv2d, nn.functional.linear)]
    assert operands == ["0.weight", "5.weight"]


@pytest.mark.parametrize(
    ("example", "expected"),
    [(X, ((X,), {})), ((X, None, 3), ((X, None, 3), {})), ({"x": X}, ((), {"x": X})), ((), ((), {})), ({}, ((), {}))],
)
def test_examples(example, expected):
    assert split_example(example) == expected


def second_mechanism(model, args, kwargs):
    """Stands for `torch.export`: a graph made in another way."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight, bias = graph.get_attr("left.weight"), graph.get_attr("left.bias")
    graph.output(graph.call_function(nn.functional.linear, (x, weight, bias)))
    return OneMode(graph)


@pytest.mark.usefixtures("concrete_only")
def test_a_second_mechanism_takes_what_the_first_refuses(monkeypatch):
    case = ZOO["data_branch"]
    monkeypatch.setitem(trace_pass.MECHANISMS, "second", second_mechanism)
    captured = trace(case.make(), case.example())
    assert captured.mechanism == "second" and captured.graphs["train"] is captured.graphs["eval"]
    sparse = fxsparse.sparsify(case.make(), case.example(), verify=False)
    assert [site.name for site in sparse.sites] == ["left.weight"] and sparse.capture == "second"
    assert "not used in forward" in sparse.report()
    assert trace(ZOO["tied_linear"].make(), ZOO["tied_linear"].example()).mechanism == "concrete"


@pytest.mark.usefixtures("concrete_only")
def test_where_all_mechanisms_refuse_the_first_reason_counts(monkeypatch):
    def refuses(model, args, kwargs):
        raise fxsparse.CaptureError("the second reason")

    monkeypatch.setitem(trace_pass.MECHANISMS, "second", refuses)
    with pytest.raises(fxsparse.CaptureError, match="truth value of a tensor"):
        trace(ZOO["data_branch"].make(), ZOO["data_branch"].example())
