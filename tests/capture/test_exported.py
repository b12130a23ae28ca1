"""Capture by `torch.export`: an oracle for the tracer, and the way for what the tracer refuses."""

import copy
import io
import logging
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import fxsparse
from fxsparse.core.errors import BakedSizeError
from fxsparse.models.zoo import ZOO
from fxsparse.models.zoo.two_linears import net
from fxsparse.passes.trace import trace

MODELS = {
    "resnet": lambda: torchvision.models.resnet18(num_classes=5),
    "squeezenet": lambda: torchvision.models.squeezenet1_1(num_classes=5),
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 8, num_classes=5),
    "swin": lambda: torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [7, 7], num_classes=5),
}
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def sparsify(model, example, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fxsparse.sparsify(model, example, **options)


# -- the two mechanisms are each other's oracle ------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["densenet", *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "densenet")]
)
def test_both_mechanisms_find_the_same(name, assert_same):
    torch.manual_seed(0)
    model = MODELS[name]()
    one, other = (sparsify(model, IMAGE, sparsity=0.8, capture=capture) for capture in ("concrete", "export"))
    assert (one.capture, other.capture) == ("concrete", "export")
    assert [(site.name, site.shape, site.depthwise, site.operation) for site in one.sites] == [
        (site.name, site.shape, site.depthwise, site.operation) for site in other.sites
    ]
    assert one.densities == other.densities and all(torch.equal(one.masks[key], other.masks[key]) for key in one.masks)
    assert one.flops().macs == other.flops().macs
    assert [(u.name, u.reason) for u in one.uncovered] == [(u.name, u.reason) for u in other.uncovered]
    for mode in (True, False):
        outputs = []
        for module in (one, other):
            module.train(mode).zero_grad()
            torch.manual_seed(1)
            outputs.append(module(IMAGE))
            outputs[-1].square().sum().backward()
        assert_same(*outputs)
        for (key, parameter), twin in zip(one.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(parameter.grad, twin.grad), key
        assert all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))
    counts = [fxsparse.count_flops(module, torch.randn(3, *IMAGE.shape[1:])).macs for module in (one, other)]
    assert counts[0] == counts[1] > one.flops().macs


def test_nodes_know_their_submodules_and_are_torchs_functions():
    graph = trace(MODELS["densenet"](), IMAGE, "export").graphs["eval"]
    targets = {node.target for node in graph.nodes if node.op == "call_function"}
    assert {torch.conv2d, torch.cat, F.batch_norm, F.linear} <= targets
    assert not any(isinstance(target, torch._ops.OpOverload) for target in targets)
    linear = next(node for node in graph.nodes if node.target is F.linear)
    assert linear.meta["fxsparse"].module == "classifier" and linear.args[1].target == "classifier.weight"


def test_a_repeated_module_keeps_its_name():
    model = net(lambda self, x: self.head(self.fc(self.fc(x))))
    graph = trace(model, ROWS, "export").graphs["eval"]
    assert [n.meta["fxsparse"].module for n in graph.nodes if n.target is F.linear] == ["fc", "fc", "head"]


# -- a captured module is a captured module ----------------------------------------------------------------


@pytest.fixture
def exported():
    torch.manual_seed(0)
    model = ZOO["auxiliary_head"].make()
    return model, sparsify(model, ZOO["auxiliary_head"].example(), sparsity=0.5, capture="export")


def test_copies_folds_and_the_way_back(exported, assert_same):
    model, sparse = exported
    x = ZOO["auxiliary_head"].example()
    stream = io.BytesIO()
    torch.save(sparse, stream)
    stream.seek(0)
    twins = [copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse)), torch.load(stream, weights_only=False)]
    twins += [sparse.fold(), sparse.copy_to(copy.deepcopy(model))]
    for twin in twins[:4]:
        assert twin.capture == "export" and twin.capture_reason == ""
    for mode in (True, False, True):
        state = {key: value.clone() for key, value in sparse.state_dict().items()}
        for twin in twins:
            twin.load_state_dict({key: state[key] for key in twin.state_dict()})
            torch.manual_seed(1)
            actual = twin.train(mode)(x)
            sparse.load_state_dict(state)
            torch.manual_seed(1)
            assert_same(sparse.train(mode)(x), actual)
        sparse.load_state_dict(state)


def test_it_compiles(exported, assert_same):
    _, sparse = exported
    x = ZOO["auxiliary_head"].example()
    sparse.eval()
    assert_same(sparse(x), torch.compile(sparse, backend="aot_eager", fullgraph=True)(x))


def test_rigl_trains_an_exported_capture():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 3))
    sparse = sparsify(model, ROWS, sparsity=0.5, update_interval=5, capture="export")
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9)
    rewirer = sparse.attach(optimizer, total_steps=20)
    before = {name: mask.clone() for name, mask in sparse.masks.items()}
    counts, losses = sparse.active_counts, []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(sparse(ROWS), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert rewirer.step_count == 20 and losses[-1] < losses[0] / 2
    assert any(not torch.equal(before[name], mask) for name, mask in sparse.masks.items())
    assert sparse.active_counts == counts
    assert all((sparse.get_parameter(name)[~mask] == 0).all() for name, mask in sparse.masks.items())


def test_a_submodule_in_another_mode_is_refused():
    """Its batch norm is inlined: `eval()` on the module alone could not reach it."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    sparse = sparsify(model, ROWS, capture="export").train()
    sparse.get_submodule("1").eval()
    with pytest.raises(fxsparse.InputError, match="1 is in eval mode while the model is in train mode"):
        sparse(ROWS)


# -- which mechanism, and why ------------------------------------------------------------------------------


def test_the_second_is_taken_where_the_first_refuses():
    sparse = sparsify(ZOO["vmapped"].make(), ROWS)
    assert sparse.capture == "export" and "concrete capture: cannot capture Vmapped" in sparse.capture_reason
    assert sparse.capture_reason in sparse.report()
    assert sparsify(net(lambda self, x: self.head(self.fc(x))), ROWS).capture_reason == ""


class BranchOnData(nn.Module):
    """Its only weight is used inside of what cannot be traced."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8))

    def forward(self, x):
        return F.linear(x, self.weight) if x.sum() > 0 else x


def test_where_all_fail_all_reasons_are_told():
    reasons = r"truth value of a tensor.*; nor by export: .*depends on the data.*; nor by opaque: no weight is used"
    with pytest.raises(fxsparse.CaptureError, match=reasons):
        fxsparse.sparsify(BranchOnData(), ROWS)


def test_an_unknown_mechanism_is_refused():
    with pytest.raises(fxsparse.ConfigError, match="'dynamo' is not one of auto, concrete, export"):
        fxsparse.sparsify(net(lambda self, x: self.head(self.fc(x))), ROWS, capture="dynamo")


def test_flops_of_what_only_export_takes():
    report = fxsparse.count_flops(ZOO["vmapped"].make(), ROWS)
    assert report.macs == 4 * 8 * 8 + 4 * 8 * 3 and not report.unknown


def test_export_says_nothing(capfd):
    logger, level = logging.getLogger("torch"), logging.root.manager.disable
    with pytest.raises(fxsparse.CaptureError):
        fxsparse.sparsify(ZOO["data_branch"].make(), ROWS, capture="export")
    assert capfd.readouterr() == ("", "") and logging.root.manager.disable == level and not logger.disabled


# -- what export would lose --------------------------------------------------------------------------------


class TwiceTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


OUTSIDE = nn.Parameter(torch.ones(8))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda self, x: self.head(TwiceTheGradient.apply(self.fc(x))), "lose the backward pass of .*TwiceTheGradient"),
        (lambda self, x: self.head(self.fc(x) * OUTSIDE), "not in the model takes part, and it has a gradient"),
        (lambda self, x: self.head(self.fc(x)) * x.sum().item() if x.sum() > 0 else x, "depends on the data"),
        (lambda self, x: setattr(self, "mean", self.fc(x).mean(0)) or self.head(x), "mean anew.* has a gradient"),
    ],
)
def test_refusals(forward, reason):
    model = net(forward, lambda self: self.register_buffer("mean", torch.zeros(8)))
    before = {key: id(value) for key, value in (*model.named_parameters(), *model.named_buffers())}
    with pytest.raises(fxsparse.CaptureError, match=f"cannot capture Net: .*{reason}"):
        fxsparse.sparsify(model, ROWS, capture="export")
    assert {key: id(value) for key, value in (*model.named_parameters(), *model.named_buffers())} == before


def test_gradients_stop_at_a_no_grad_region_also_in_place(assert_same):
    def forward(self, x):
        with torch.no_grad():
            self.mean.mul_(0.5).add_(self.fc(x).mean(0))
            target = self.fc(x)
            target.clamp_(-1, 1)
        return (self.head(self.fc(x)) - target[:, :3] * self.mean[:3]).square()

    model = net(forward, lambda self: self.register_buffer("mean", torch.zeros(8)))
    sparse = sparsify(model, ROWS, sparsity=0.0, capture="export")
    for _ in range(2):
        inputs = [ROWS * 2, ROWS * 2]
        for module, x in zip((model, sparse), inputs, strict=True):
            module(x).sum().backward()
        assert_same(*inputs)
        assert_same(model.mean, sparse.get_buffer("mean"))
        assert_same(model.fc.weight.grad, sparse.get_parameter("fc.weight").grad)


@pytest.mark.parametrize(
    "change",
    [lambda y: y.mul_(2), lambda y: y.copy_(ROWS), F.relu_, lambda y: y.view(-1).zero_(), lambda y: y[:, 0].fill_(1)],
)
def test_a_change_in_place_inside_a_region_keeps_the_gradients_before_it(change, assert_same):
    """What is detached and changed would lose its history, which eager keeps: refused, and captured otherwise."""

    def forward(self, x):
        y = self.fc(x)
        with torch.no_grad():
            change(y)
        return self.head(y)

    with pytest.raises(fxsparse.CaptureError, match="in-place change inside a no_grad region"):
        sparsify(net(forward), ROWS, capture="export")
    model = net(forward)
    with pytest.warns(fxsparse.FxSparseWarning, match="kept as one call"):
        sparse = fxsparse.sparsify(model, ROWS, sparsity=0.0)
    assert sparse.capture == "opaque"
    for module in (model, sparse):
        module(ROWS).sum().backward()
    assert_same(model.fc.weight.grad, sparse.get_parameter("fc.weight").grad)


def test_a_change_of_an_input_inside_a_region_is_refused():
    """The input may have a history at another call."""

    def forward(self, x):
        with torch.no_grad():
            x.clamp_(-1, 1)
        return self.head(self.fc(x))

    with pytest.raises(fxsparse.CaptureError, match="in-place change inside a no_grad region"):
        sparsify(net(forward), ROWS.clone(), capture="export")


# -- sizes -------------------------------------------------------------------------------------------------


def test_conditions_on_sizes_are_checked_with_the_line():
    def forward(self, x):
        x = self.fc(x)
        return self.head(x if x.shape[0] % 2 == 0 else x * 2)

    sparse = sparsify(net(forward), ROWS, capture="export")
    assert sparse(ROWS[:2]).shape == (2, 3)
    with pytest.raises(fxsparse.InputError, match=r"test_exported\.py:\d+: `return .*` decided by .*x\.shape\[0\]"):
        sparse(ROWS[:3])


def test_other_inputs_are_refused_by_name():
    def forward(self, pair, *, scale=None):
        return self.head(self.fc(pair["a"]) + pair["b"][0].view(4, 8))

    sparse = sparsify(net(forward), ({"a": ROWS, "b": [ROWS]},), capture="export")
    sparse({"a": ROWS, "b": [ROWS]})
    with pytest.raises(fxsparse.InputError, match=r"argument pair\['b'\]\[0\]: .* sizes \(4, 8\), got \(3, 8\)"):
        sparse({"a": ROWS, "b": [ROWS[:3]]})
    with pytest.raises(fxsparse.InputError, match=r"argument pair\['a'\]: .* torch.float32 on cpu, got torch.float64"):
        sparse({"a": ROWS.double(), "b": [ROWS]})
    with pytest.raises(fxsparse.InputError, match="argument scale: the graph was captured with None, got 2"):
        sparse({"a": ROWS, "b": [ROWS]}, scale=2)


@pytest.mark.parametrize("capture", ["concrete", "export"])
@pytest.mark.parametrize("text", ["f'in{x.shape[0]}'", "'in' + str(x.size(0))", "'in%d' % x.shape[0]", "str(x.shape)"])
def test_a_text_made_of_a_size_decides_and_a_message_does_not(capture, text):
    def forward(self, x):
        assert x.shape[1] == 8, f"{x.shape} is not {x.shape[0]} rows of 8"
        torch._assert(x.dim() == 2, f"{x.shape} is no matrix")
        return self.head(self.fc(x)) * self.scales.get(eval(text, {"x": x}), 7.0)

    def said(self, x):
        torch._assert(x.dim() == 2, f"{x.shape} is no matrix of {x.shape[0]} rows")
        return self.head(self.fc(x))

    def prepare(self):
        self.scales = {"in4": 2.0, "torch.Size([4, 8])": 3.0}

    sparse = sparsify(net(forward, prepare), ROWS, capture=capture)
    with pytest.raises(fxsparse.InputError, match="capture again"):
        sparse(ROWS[:2])
    assert sparsify(net(said), ROWS, capture=capture)(ROWS[:2]).shape == (2, 3)


def test_a_node_that_fails_for_other_sizes_is_named():
    def forward(self, x):
        return self.head(self.fc(x) + self.table)

    model = net(forward, lambda self: self.register_buffer("table", torch.zeros(4, 8)))
    sparse = sparsify(model, ROWS, capture="concrete")
    with pytest.raises(BakedSizeError, match=r"node add fails for \(3, 8\) .*captured for \(4, 8\) .*baked in"):
        sparse(ROWS[:3])


# -- what forward does besides -----------------------------------------------------------------------------

PUT_AWAY = []


def test_what_forward_changes_is_noted_and_nothing_fake_is_left():
    def forward(self, x):
        self.calls += 1
        PUT_AWAY.append(self.fc(x))
        return self.head(PUT_AWAY[-1])

    model = net(forward, lambda self: setattr(self, "calls", 0))
    PUT_AWAY.clear()
    captured = trace(model, ROWS, "export")
    assert not PUT_AWAY and model.calls == 0 and captured.model.calls == 0
    assert captured.notes == [
        "forward changes calls; the graph leaves them as they are",
        "forward puts tensors away outside the model; the graph does not",
    ]


def test_a_counter_that_is_part_of_the_result_is_noticed():
    def forward(self, x):
        self.calls += 1
        return self.head(self.fc(x)) * self.calls

    with pytest.raises(fxsparse.VerificationError, match="called again"):
        fxsparse.sparsify(net(forward, lambda self: setattr(self, "calls", 0)), ROWS, capture="export")


def test_a_hook_on_a_tensor_is_refused():
    def forward(self, x):
        x = self.fc(x)
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * 3)
        return self.head(x)

    with pytest.raises(fxsparse.CaptureError, match="a hook is registered on a tensor"):
        fxsparse.sparsify(net(forward), ROWS, capture="export")
