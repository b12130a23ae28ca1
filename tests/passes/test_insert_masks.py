"""Masks in the graph: where they go, what they change, and how they come out again."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from fxsparse import apply_mask
from fxsparse.core.graphs import pack_graph
from fxsparse.core.records import record_of
from fxsparse.models.zoo import ZOO
from fxsparse.passes.annotate_shapes import annotate_shapes
from fxsparse.passes.find_sites import find_sites
from fxsparse.passes.insert_masks import insert_masks
from fxsparse.passes.remove_masks import remove_masks
from fxsparse.passes.trace import trace


def captured_zoo(name):
    torch.manual_seed(0)
    return trace(ZOO[name].make(), ZOO[name].example())


def masked_nodes(graph):
    return [node for node in graph.nodes if node.target is apply_mask]


def ancestors(node):
    return {node}.union(*map(ancestors, node.all_input_nodes))


def reads(graph, name):
    return [node for node in graph.nodes if node.op == "get_attr" and node.target == name]


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.refused is None])
def test_every_use_of_a_site_goes_through_its_mask(name):
    captured = captured_zoo(name)
    sites, _ = find_sites(captured)
    assert insert_masks(captured, sites)
    for mode, graph in captured.distinct_graphs():
        graph.lint()
        for site in sites:
            weights = [node for alias in (site.name, *site.aliases) for node in reads(graph, alias)]
            if any(use.mode == mode for use in site.uses):
                assert weights
            for weight in weights:
                (masked,) = weight.users  # nothing else reads the weight itself
                assert masked.target is apply_mask
                assert masked.args[1].target == f"{site.name}_mask" and masked.args[2].target == "dense_gradient"
            for use in site.uses:
                if use.mode == mode:
                    (user,) = [node for node in graph.nodes if node.name == use.node]
                    assert masked in ancestors(user)


def test_a_tied_weight_has_one_mask():
    captured = captured_zoo("tied_linear")
    sites, _ = find_sites(captured)
    insert_masks(captured, sites)
    graph = captured.graphs["eval"]
    assert len(sites) == 2 and len(masked_nodes(graph)) == 2
    (tied,) = [node for node in masked_nodes(graph) if node.args[0].target == "first.weight"]
    assert len(tied.users) == 2 and not reads(graph, "second.weight")


def test_only_the_given_sites_are_masked():
    captured = captured_zoo("called_twice")
    sites, _ = find_sites(captured)
    insert_masks(captured, sites[:1])
    (masked,) = masked_nodes(captured.graphs["eval"])
    assert masked.args[0].target == "stem.weight"
    assert not insert_masks(captured_zoo("called_twice"), [])


def test_records_of_masked_weights():
    captured = captured_zoo("called_twice")
    annotate_shapes(captured)
    insert_masks(captured, find_sites(captured)[0])
    for node in masked_nodes(captured.graphs["eval"]):
        inputs = 3 if "stem" in node.name else 4
        assert record_of(node).spec.shape == record_of(node.args[0]).spec.shape == (4, inputs, 3, 3)
        assert record_of(node).module == str(node.args[0].target).rpartition(".")[0]


@pytest.mark.parametrize("name", ["tied_linear", "mode_switch", "unrolled_gru", "dense_concat"])
def test_removing_the_masks_undoes_inserting_them(name):
    captured, plain = captured_zoo(name), captured_zoo(name)
    annotate_shapes(plain)
    insert_masks(captured, find_sites(captured)[0])
    for mode in ("train", "eval"):
        masked = captured.graphs[mode]
        before = pack_graph(masked)
        assert pack_graph(remove_masks(masked)) == pack_graph(plain.graphs[mode])
        assert pack_graph(masked) == before  # a new graph; the old one is as it was


def test_masks_change_in_place_and_the_output_follows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(4, 8)
    sparse = fxsparse.sparsify(model, x, sparsity=0.0)
    code, mask, weight = sparse.code, sparse.masks["0.weight"], sparse.get_parameter("0.weight")
    assert torch.equal(sparse(x), model(x))
    mask[:, 3] = False
    hidden = torch.relu(F.linear(x, model[0].weight * mask, model[0].bias))
    eager = F.linear(hidden, model[2].weight, model[2].bias)
    assert torch.equal(sparse(x), eager)
    assert torch.equal(weight, model[0].weight)  # applied in the graph; storage is the runtime's business
    mask.fill_(True)
    assert torch.equal(sparse(x), model(x)) and sparse.code == code


def test_gradients_are_masked_or_dense_as_the_flag_says():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(4, 8)
    sparse = fxsparse.sparsify(model, x, sparsity=0.5, distribution="uniform", dense="last")
    masks = sparse.masks
    multiplied = {name: (sparse.get_parameter(name) * mask).detach().requires_grad_() for name, mask in masks.items()}
    bias = {name: parameter for name, parameter in model.named_parameters() if name.endswith("bias")}
    torch.func.functional_call(model, multiplied | bias, (x,)).square().sum().backward()
    for dense in (False, True, False):
        sparse.zero_grad()
        sparse.dense_gradient = dense
        sparse(x).square().sum().backward()
        for name, mask in masks.items():
            expected = multiplied[name].grad
            assert torch.equal(sparse.get_parameter(name).grad, expected if dense else expected * mask)
    assert (expected != 0).sum() > (expected * mask != 0).sum() or mask.all()
