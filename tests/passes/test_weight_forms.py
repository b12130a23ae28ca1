"""Weights in every form people write: what is a site, how it is allocated, what it costs, and what is no weight."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import fxsparse
from fxsparse.core.weight_origin import origins_of
from fxsparse.passes.annotate_shapes import annotate_shapes
from fxsparse.passes.find_sites import find_sites
from fxsparse.passes.trace import trace

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def net(forward, **tensors):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in tensors.items():
                setattr(self, name, nn.Parameter(value) if isinstance(value, torch.Tensor) else value)

    Net.forward = forward
    return Net()


def r(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 3


def found(model, example=X):
    sites, uncovered = find_sites(trace(model, example))
    return {site.name: site for site in sites}, {item.name: item.reason for item in uncovered}


def modules(*layers):
    return nn.ModuleList(layers)


FORMS = {
    # forward, tensors, {site: (operation, matrix, form)}
    "matmul": (lambda s, x: x @ s.w, {"w": r(8, 6)}, {"w": ("matmul", (6, 8), "")}),
    "matmul method": (lambda s, x: x.matmul(s.w), {"w": r(8, 6)}, {"w": ("matmul", (6, 8), "")}),
    "from the left": (lambda s, x: s.w @ x, {"w": r(6, 4)}, {"w": ("matmul", (6, 4), "")}),
    "transposed": (lambda s, x: x @ s.w.t(), {"w": r(6, 8)}, {"w": ("matmul", (6, 8), "")}),
    "read as T": (lambda s, x: F.linear(x, s.w.T), {"w": r(8, 6)}, {"w": ("linear", (6, 8), "")}),
    "addmm": (lambda s, x: torch.addmm(s.b, x, s.w), {"b": r(6), "w": r(8, 6)}, {"w": ("addmm", (6, 8), "")}),
    "a vector's": (lambda s, x: torch.mv(s.w, x[0]), {"w": r(6, 8)}, {"w": ("mv", (6, 8), "")}),
    "a slice": (lambda s, x: F.linear(x, s.w[1:5]), {"w": r(6, 8)}, {"w": ("linear", (6, 8), "used in parts")}),
    "chunks": (
        lambda s, x: sum(F.linear(x, part) for part in s.w.chunk(3)),
        {"w": r(6, 8)},
        {"w": ("linear", (6, 8), "used in parts")},
    ),
    "reshaped": (
        lambda s, x: F.conv2d(x.view(1, 2, 4, 4), s.w.view(6, 2, 3, 3)),
        {"w": r(6, 18)},
        {"w": ("conv2d", (6, 2, 3, 3), "")},
    ),
    "a bank by bmm": (
        lambda s, x: torch.bmm(x.expand(3, -1, -1), s.w),
        {"w": r(3, 8, 6)},
        {"w": ("bmm", (6, 8), "")},
    ),
    "a bank by index": (
        lambda s, x: sum(F.linear(x, s.w[i]) for i in range(3)),
        {"w": r(3, 6, 8)},
        {"w": ("linear", (6, 8), "used in parts")},
    ),
    "a bank by einsum": (
        lambda s, x: torch.einsum("bi,eoi->ebo", x, s.w),
        {"w": r(3, 6, 8)},
        {"w": ("einsum", (18, 8), "")},  # one input for all: as one matrix
    ),
    "a bank by einsum, an input each": (
        lambda s, x: torch.einsum("bei,eoi->beo", x.view(4, 2, 4), s.w),
        {"w": r(2, 6, 4)},
        {"w": ("einsum", (6, 4), "")},
    ),
    "a bank by router": (
        lambda s, x: torch.bmm(s.w[s.gate(x).argmax(-1)], x[..., None]).squeeze(-1) * s.gate(x).amax(-1, keepdim=True),
        {"w": r(3, 6, 8), "gate": nn.Linear(8, 3)},
        {"w": ("bmm", (6, 8), ""), "gate.weight": ("linear", (3, 8), "")},
    ),
    "joined": (
        lambda s, x: F.linear(x, torch.cat([s.a, s.b.t()])),
        {"a": r(6, 8), "b": r(8, 2)},
        {"a": ("linear", (6, 8), ""), "b": ("linear", (8, 2), "")},
    ),
    "stacked": (
        lambda s, x: torch.bmm(x.expand(2, -1, -1), torch.stack([layer.weight.t() for layer in s.layers])),
        {"layers": modules(nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False))},
        {"layers.0.weight": ("bmm", (6, 8), ""), "layers.1.weight": ("bmm", (6, 8), "")},
    ),
    "scaled": (
        lambda s, x: F.linear(x, s.w * s.g),
        {"w": r(6, 8), "g": r(6, 1)},
        {"w": ("linear", (6, 8), "computed by mul")},
    ),
    "centred": (
        lambda s, x: F.linear(x, s.w - s.w.mean()),
        {"w": r(6, 8)},
        {"w": ("linear", (6, 8), "computed by sub, where zeros do not stay")},
    ),
    "with an update of low rank": (
        lambda s, x: F.linear(x, s.w + s.a @ s.b),
        {"w": r(6, 8), "a": r(6, 2), "b": r(2, 8)},
        {"w": ("linear", (6, 8), "computed by add, where zeros do not stay")},
    ),
    "bilinear": (
        lambda s, x: s.layer(x, x[:, :3]),
        {"layer": nn.Bilinear(8, 3, 5)},
        {"layer.weight": ("bilinear", (5, 24), "")},
    ),
    "noise in": (lambda s, x: x + torch.randn(4, 3) @ s.w, {"w": r(3, 8)}, {"w": ("matmul", (8, 3), "")}),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    forward, tensors, expected = FORMS[name]
    sites, _ = found(net(forward, **tensors))
    seen = {key: (site.operation, site.matrix or site.shape, site.form) for key, site in sites.items()}
    assert seen == {
        key: (operation, matrix if seen[key][1] == matrix else matrix[::-1], form)
        for key, (operation, matrix, form) in expected.items()
    }


@pytest.mark.parametrize("name", FORMS)
def test_the_masked_graph_is_the_masked_model(name):
    forward, tensors, expected = FORMS[name]
    model = net(forward, **tensors)
    if name == "noise in":
        torch.manual_seed(0)
    sparse = fxsparse.sparsify(model, X, sparsity=0.5, distribution={"*": 0.5}, method="static")
    assert set(sparse.masks) == set(expected)
    sparse.copy_to(model)
    outputs = []
    for module in (model, sparse):
        torch.manual_seed(0)
        outputs.append(module(X))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    for key, mask in sparse.masks.items():
        assert torch.equal(sparse.get_parameter(key).grad, model.get_parameter(key).grad * mask)


NOT_WEIGHTS = {
    "two of its size": (
        lambda s, x: F.linear(x, s.a * s.b),
        {"a": r(6, 8), "b": r(6, 8)},
        "the weight of linear in the model's forward is computed from it, and a, b have as many elements as the weight",
    ),
    "none of its size": (
        lambda s, x: F.linear(x, s.a @ s.b),
        {"a": r(6, 2), "b": r(2, 8)},
        "the weight of linear in the model's forward is computed from it, and none of its parameters has as many",
    ),
    "from the input too": (
        lambda s, x: F.linear(x, s.w * x[0]),
        {"w": r(6, 8)},
        "the weight of linear in the model's forward is computed from it and from the input",
    ),
    "rows by index": (
        lambda s, x: x @ s.w[torch.tensor([1, 0, 2])].t(),
        {"w": r(3, 8)},
        "the weight of matmul in the model's forward is computed from it, and its rows are chosen by index",
    ),
    "no gradient": (lambda s, x: F.linear(x, s.w.detach()), {"w": r(6, 8)}, "enters by detach in the model's forward"),
    "two parameters": (
        lambda s, x: x[:, :6] + (s.a @ s.b).sum(),
        {"a": r(6, 8), "b": r(8, 6)},
        "enters by matmul in the model's forward",
    ),
    "added": (lambda s, x: x + s.w, {"w": r(4, 8)}, "enters by add in the model's forward"),
    "as the input": (
        lambda s, x: x.sum() + s.layer(s.w),
        {"w": r(5, 8), "layer": nn.Linear(8, 3)},
        "enters by linear in the model's forward".replace("the model's forward", "layer"),
    ),
    "bag": (
        lambda s, x: s.bag((x > 0).long()),
        {"bag": nn.EmbeddingBag(2, 5)},
        "an embedding table",
    ),
}


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_what_is_no_weight_is_listed_with_the_reason(name):
    forward, tensors, reason = NOT_WEIGHTS[name]
    sites, uncovered = found(net(forward, **tensors))
    named = {key for key, value in tensors.items() if isinstance(value, torch.Tensor)} or {"bag.weight"}
    assert not named & set(sites)
    assert all(uncovered[key].startswith(reason) for key in named), uncovered


@pytest.mark.parametrize("name", ["rel_pos", "pos_embed", "class_token"])
def test_tables_of_positions_are_left_out_unless_named(name):
    model = net(lambda s, x: s.head(x @ getattr(s, name).t()), head=nn.Linear(5, 3), **{name: r(5, 8)})
    sparse = fxsparse.sparsify(model, X, sparsity=0.5)
    assert list(sparse.masks) == ["head.weight"]
    assert sparse.uncovered[0].reason.startswith("positions or tokens, by its name")
    assert name in fxsparse.sparsify(model, X, sparsity=0.5, include="*").masks


def test_an_embedding_that_only_products_use_is_left_out():
    model = net(lambda s, x: s.head(x @ s.codes.weight.t()), head=nn.Linear(5, 3), codes=nn.Embedding(5, 8))
    assert list(fxsparse.sparsify(model, X, sparsity=0.5).masks) == ["head.weight"]


def test_a_layer_may_have_any_name():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Linear(8, 8)
            self.pos = nn.Parameter(r(8, 8))

        def forward(self, x):
            return F.linear(self.token(x), self.pos)

    assert list(fxsparse.sparsify(Token(), X, sparsity=0.5).masks) == ["token.weight", "pos"]


# -- allocation -------------------------------------------------------------------------------------------------


def test_a_bank_is_allocated_as_its_matrices():
    """Three experts (6, 8) and a head (5, 18): as if the experts were three layers of their own."""

    def forward(self, x):
        return self.head(torch.bmm(x.expand(3, -1, -1), self.bank).transpose(0, 1).flatten(1))

    model = net(forward, bank=r(3, 8, 6), head=nn.Linear(18, 5))
    for distribution in ("er", "erk", "uniform"):
        shapes = {"a": (6, 8), "b": (6, 8), "c": (6, 8), "head.weight": (5, 18)}
        sparse = fxsparse.sparsify(model, X, sparsity=0.6, distribution=distribution)
        if distribution == "uniform":
            assert sparse.target_sparsities == {"bank": 0.0, "head.weight": 0.6}
            continue
        apart = fxsparse.allocate(shapes, 0.6, distribution)
        assert sparse.target_sparsities["bank"] == pytest.approx(apart["a"])
        assert sparse.target_sparsities["head.weight"] == pytest.approx(apart["head.weight"])


def test_allocate_takes_numbers_of_matrices():
    apart = fxsparse.allocate({"a": (6, 8), "b": (6, 8), "c": (5, 18)}, 0.6)
    together = fxsparse.allocate({"ab": (6, 8), "c": (5, 18)}, 0.6, matrices={"ab": 2})
    assert together == pytest.approx({"ab": apart["a"], "c": apart["c"]})


def test_a_budget_in_flops_counts_products():
    """x @ w (4 rows, 8x6) and a linear (6, 5): the products are part of what the budget can save."""
    model = net(lambda s, x: s.head(x @ s.w), w=r(8, 6), head=nn.Linear(6, 5))
    sparse = fxsparse.sparsify(model, X, flops=0.5, distribution="er")
    counts = sparse.active_counts
    assert sparse.flops().macs == 4 * (counts["w"] + counts["head.weight"])
    assert sparse.flops().ratio == pytest.approx(0.5, abs=0.02)


# -- costs ------------------------------------------------------------------------------------------------------


def costs(model, example, sparsity=0.5):
    sparse = fxsparse.sparsify(model, example, sparsity=sparsity, distribution={"*": sparsity}, method="static")
    report = sparse.flops()
    assert report.dense_macs == fxsparse.count_flops(model, example).macs
    return sparse.active_counts, report


def test_a_recurrent_layer_costs_every_active_weight_once_a_step():
    counts, report = costs(nn.LSTM(8, 6, bidirectional=True, batch_first=True), torch.randn(2, 5, 8))
    assert report.dense_macs == 2 * 5 * 2 * (24 * 8 + 24 * 6)
    assert report.macs == 2 * 5 * sum(counts.values())
    assert {node.weight for node in report.nodes if node.macs} == set(counts)
    sparse_backward = sum(node.sparse_backward for node in report.nodes)
    assert 0 < sparse_backward < sum(node.backward for node in report.nodes)


def test_a_cell_costs_its_weights_at_every_call():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(8, 6)

        def forward(self, x):
            state = None
            for frame in x.unbind(1):
                state = self.cell(frame, state)
            return state

    counts, report = costs(Loop(), torch.randn(2, 5, 8))
    assert report.dense_macs == 2 * 5 * 18 * (8 + 6) and report.macs == 2 * 5 * sum(counts.values())


def test_attention_to_something_else_costs_each_part_of_the_packed_weight_by_its_own_rows():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x, y):
            return self.layer(x, y, y, need_weights=False)[0]

    counts, report = costs(Cross(), (torch.randn(1, 3, 8), torch.randn(1, 7, 8)))
    parts = {node.elements: node for node in report.nodes if node.weight == "layer.in_proj_weight"}
    assert parts[64].macs == 3 * 64 and parts[128].macs == 7 * 128
    products = 2 * 3 * 7 * 8
    assert report.dense_macs == 3 * 64 + 7 * 128 + 3 * 64 + products
    mask_parts = parts[64].active + parts[128].active
    assert mask_parts == counts["layer.in_proj_weight"]
    assert report.macs == 3 * parts[64].active + 7 * parts[128].active + 3 * counts["layer.out_proj.weight"] + products


@pytest.mark.parametrize(
    "take", [lambda w: w[1:3], lambda w: w.t().chunk(3, 1)[2].t(), lambda w: w[:, None].select(1, 0)[4:]]
)
def test_a_part_costs_what_is_active_in_it(take):
    """Not its share of the whole: half of the rows may be empty."""
    model = net(lambda s, x: F.linear(x, take(s.w)), w=r(6, 8))
    sparse = fxsparse.sparsify(model, X, sparsity=0.5)
    mask = sparse.masks["w"]
    mask.copy_(torch.arange(6)[:, None] < 3)
    assert sparse.flops().macs == 4 * int(take(mask).sum())
    mask[1, :5] = False
    assert sparse.flops().macs == 4 * int(take(mask).sum())


def test_zeros_count_where_they_stay_zero():
    image = torch.randn(1, 3, 6, 6)
    counts, report = costs(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), image)
    assert report.macs == 16 * counts["parametrizations.weight.original1"] < report.dense_macs
    _, report = costs(net(lambda s, x: F.linear(x, s.w - s.w.mean()), w=r(6, 8)), X)
    assert report.macs == report.dense_macs == 4 * 48
    assert [node.detail for node in report.nodes if node.macs] == ["zeros of w are none after sub"]


@pytest.mark.parametrize("name", [name for name in FORMS if name not in ("noise in", "bilinear")])
def test_zeros_are_claimed_only_where_they_are(name):
    """The weight itself, computed for real from masked parameters, has as many zeros as its origin says."""
    forward, tensors, _ = FORMS[name]
    sparse = fxsparse.sparsify(net(forward, **tensors), X, sparsity=0.5, distribution={"*": 0.5}, method="static")
    values = {}

    class Kept(torch.fx.Interpreter):
        def run_node(self, n):
            values[n.name] = super().run_node(n)
            return values[n.name]

    Kept(sparse).run(X)
    for site in sparse.sites:
        for use in site.uses:
            node = next(node for node in sparse.graph.nodes if node.name == use.node)
            for weight in node.all_input_nodes:
                origins = origins_of(sparse, weight)
                if isinstance(origins, list) and origins and all(origin.keeps_zeros for origin in origins):
                    assert (values[weight.name] == 0).any()
                elif origins:
                    assert not (values[weight.name] == 0).any()


def test_a_mixture_by_einsum_costs_its_bank_in_the_first_step_only():
    """`bi,eio,be->bo` from left to right: the bank meets the input, then the gate meets what came of it."""
    model = net(
        lambda s, x: torch.einsum("bi,eio,be->bo", x, s.bank, s.gate(x).softmax(-1)),
        bank=r(3, 8, 6),
        gate=nn.Linear(8, 3),
    )
    counts, report = costs(model, X)
    nodes = {node.weight: node for node in report.nodes if node.operation == "einsum"}
    if not torch.backends.opt_einsum.enabled or not torch.backends.opt_einsum.is_available():
        assert nodes["bank"].macs == 4 * 3 * 8 * 6 and nodes[None].macs == 4 * 3 * 6
    assert report.macs == report.dense_macs - sum(node.macs - node.sparse_macs for node in report.nodes)
    assert nodes["bank"].sparse_macs == nodes["bank"].macs // 144 * counts["bank"]


def test_experts_that_a_router_chose_cost_their_share_of_the_bank():
    forward, tensors, _ = FORMS["a bank by router"]
    counts, report = costs(net(forward, **tensors), X)
    (bank,) = [node for node in report.nodes if node.weight == "w"]
    assert (bank.macs, bank.elements) == (4 * 6 * 8, 3 * 6 * 8)  # one expert a row
    assert bank.sparse_macs == 4 * 6 * 8 * counts["w"] // 144


def test_shapes_are_annotated_where_they_are_not():
    captured = trace(net(lambda s, x: x @ s.w, w=r(8, 6)), X)
    assert [site.name for site in find_sites(captured)[0]] == ["w"]
    annotate_shapes(captured)
    assert [site.name for site in find_sites(captured)[0]] == ["w"]
