"""What `compact` gives, where fxsparse is not installed: saved, loaded, trained on, exported, in ONNX Runtime."""

import pickle
import subprocess
import sys

import pytest
import torch
import torchvision
from torch import fx, nn

import fxsparse
from fxsparse.models.channel_nets import CHANNEL_NETS, example_of
from fxsparse.models.registry import build
from fxsparse.models.zoo import ZOO

NEEDS_FXSPARSE = {
    "auxiliary_head", "mode_switch", "functional_dropout", "stochastic_depth", "random_noise", "frozen_batch_norm",
    "augmented_counter", "running_mean", "decoder_layer",
} | {
    "dict_io", "tuple_io", "list_io", "namedtuple_io", "dataclass_io", "positional_variadic", "keyword_variadic",
    "length_loop", "half_size", "factories", "running_counter", "unrolled_gru", "own_attention",
    "assigned_buffer", "cell_loop", "module_gru", "module_lstm", "vmapped",
}  # fmt: skip
"""Networks of the zoo with a graph for each mode (first), or with a graph that fx cannot save or load as it is."""

ELSEWHERE = """
import sys
sys.modules["fxsparse"] = None  # importing it fails
import torch
torch.set_num_threads(1)
for module, x, expected in torch.load(sys.argv[1], weights_only=False):
    assert type(module).__mro__[1] is torch.fx.GraphModule, type(module).__mro__
    assert not any(name.startswith("fxsparse.") for name in sys.modules)
    for training, outputs in expected.items():
        module.train(training)
        torch.manual_seed(0)
        torch.testing.assert_close(module(x), outputs, rtol=1e-4, atol=1e-4)
    print("equal")
"""


def shrunk(model, x, tools):
    return fxsparse.compact(model, x, remove=tools.half_of(fxsparse.channel_groups(model, x)))


def image_models(tools):
    """`(model, example)` of networks without functions of their own among their attributes."""
    yield tools.randomised(build("small_resnet", in_channels=3), torch.float32), torch.randn(2, 3, 32, 32)
    for name in ("shufflenet_v2_x0_5", "mobilenet_v3_small"):
        yield (
            tools.randomised(torchvision.models.get_model(name, weights=None), torch.float32),
            torch.randn(2, 3, 64, 64),
        )


def test_it_is_saved_and_runs_without_fxsparse(tmp_path, tools):
    """Another process may sum in another order: its memory lies elsewhere."""
    torch.manual_seed(0)
    saved = []
    for model, x in image_models(tools):
        small = shrunk(model, x, tools)
        expected = {training: tools.outputs(small, x, training)[0] for training in (False, True)}
        saved.append((small, x, expected))
    for name in ("residual", "cat, split, cat", "fused attention", "rotary embedding"):
        x = example_of(name)
        small = shrunk(tools.randomised(CHANNEL_NETS[name](), torch.float32), x, tools)
        saved.append((small, x, {False: tools.outputs(small, x)[0]}))
    torch.save(saved, tmp_path / "saved.pt")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "saved.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["equal"] * 7


def test_layers_are_called_and_keys_stay(tools):
    model = tools.randomised(build("small_resnet", in_channels=3), torch.float32)
    x = torch.randn(2, 3, 32, 32)
    small = shrunk(model, x, tools)
    plain = small.graph_module(training=False)
    assert type(plain).__mro__[1] is fx.GraphModule and not plain.training
    assert not {node.op for node in plain.graph.nodes} & {"get_attr"}
    kinds = {type(plain.get_submodule(node.target)) for node in plain.graph.nodes if node.op == "call_module"}
    assert {nn.Conv2d, nn.BatchNorm2d, nn.Linear} <= kinds
    again = pickle.loads(pickle.dumps(small))
    for other in (plain, again):
        assert list(other.state_dict()) == list(model.state_dict())
        assert all(torch.equal(value, small.state_dict()[key]) for key, value in other.state_dict().items())
        assert [name for name, _ in other.named_parameters()] == [name for name, _ in model.named_parameters()]
    plain.get_submodule("bn1" if hasattr(plain, "bn1") else next(n for n, _ in plain.named_children())).eval()
    with torch.no_grad():
        next(plain.parameters()).zero_()
    assert next(small.parameters()).abs().sum() > 0  # a copy
    assert next(small.graph_module(share=True).parameters()) is next(small.parameters())


@pytest.mark.parametrize("name", CHANNEL_NETS)
def test_every_hard_network_as_a_plain_graph(name, tools):
    model = tools.randomised(CHANNEL_NETS[name]())
    small = shrunk(model, example_of(name).double(), tools)
    for other in (small.graph_module(training=True), pickle.loads(pickle.dumps(small.graph_module()))):
        assert list(other.state_dict()) == list(model.state_dict())
        for training in (False, True):
            for batch in (1, 2, 7):
                x = example_of(name, batch, seed=batch).double()
                pairs = zip(tools.outputs(small, x, training), tools.outputs(other, x, training), strict=True)
                assert all(torch.equal(one, two) for one, two in pairs)


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.refused is None])
def test_the_zoo_is_plain_or_stays_what_it_is(name):
    case = ZOO[name]
    torch.manual_seed(0)
    small = fxsparse.compact(case.make(), case.example())
    buffers = [buffer.clone() for buffer in small.buffers()]
    pickled = pickle.dumps(small)
    assert all(map(torch.equal, buffers, small.buffers()))  # looking does not run what moves a buffer
    assert (b"fxsparse.channels" not in pickled) == (name not in NEEDS_FXSPARSE)
    assert list(pickle.loads(pickled).state_dict()) == list(small.state_dict())


def test_what_is_in_the_way_is_named(tools):
    class Guarded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x, scale=None):
            y = self.conv(x)
            return y.mean((2, 3)) if len(y.unbind(1)) == 8 and scale is None else y

    x = torch.randn(2, 3, 8, 8)
    plain = fxsparse.compact(Guarded(), x).graph_module()
    plain(x)
    with pytest.raises(AssertionError, match="argument scale"):
        plain(x, 2.0)
    sparse = fxsparse.sparsify(Guarded(), x, sparsity=0.5)
    with pytest.raises(fxsparse.CaptureError, match="apply_mask of fxsparse"):
        sparse.graph_module()
    assert torch.equal(sparse.fold().graph_module()(x), sparse(x))
    case = ZOO["running_counter"]
    with pytest.raises(fxsparse.CaptureError, match="fx would load another graph"):
        fxsparse.compact(case.make(), case.example()).graph_module()


EXPORTED = ["residual", "cat, split, cat", "channel shuffle", "fused attention", "small_resnet"]
LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "mobilenet_v3_small", "swin_t")]


def made(name, tools):
    if name in CHANNEL_NETS:
        return tools.randomised(CHANNEL_NETS[name](), torch.float32), example_of(name), example_of(name, 7)
    own = name == "small_resnet"
    model = build(name, in_channels=3) if own else torchvision.models.get_model(name, weights=None)
    size = 32 if own else 64
    return tools.randomised(model, torch.float32), torch.randn(2, 3, size, size), torch.randn(5, 3, size, size)


@pytest.mark.parametrize("name", EXPORTED + LONG)
def test_export_and_onnx_with_any_batch(name, tools, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x, other = made(name, tools)
    small = shrunk(model, x, tools).eval()
    shapes = ({0: torch.export.Dim("batch")},)
    for module in (small.graph_module(), *([small] if name != "swin_t" else [])):  # swin's modes differ
        exported = torch.export.export(module, (x,), dynamic_shapes=shapes)
        torch.testing.assert_close(exported.module()(other), small(other))
    program = torch.onnx.export(small.graph_module(), (x,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    for batch in (x, other):
        (found,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        tools.assert_close([small(batch).detach()], [torch.from_numpy(found)], 1e-5)
