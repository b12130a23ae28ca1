"""A module lowered for inference computes what the masked one does."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
import fxsparse.models as models
from fxsparse.kernels.calls import fused_conv, fused_linear
from fxsparse.models.zoo import ZOO, call, tensors

from .runs import masked


def randomised(model, seed=0):
    """Statistics of batch normalisation that are no identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor, low in (
                    (module.running_mean, -0.5),
                    (module.running_var, 0.5),
                    (module.weight, 0.5),
                    (module.bias, -0.5),
                ):
                    if tensor is not None:
                        tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return model


def lowered_pair(model, x, sparsity=0.7, **options):
    torch.manual_seed(0)
    given = {"sparsity": sparsity, "distribution": {}, "verify": False} | options
    if not given["distribution"]:
        given["distribution"] = "er"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxsparse.FxSparseWarning)
        sparse = fxsparse.sparsify(model, x, "static", **given).eval()
    return sparse, sparse.lower(layers="all", verify=False)


def fused(lowered):
    return [node for node in lowered.graph.nodes if node.target in (fused_conv, fused_linear)]


class Block(nn.Module):
    def __init__(self, form, inplace=True):
        super().__init__()
        self.form = form
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1, bias=form != "no bias"), nn.Conv2d(8, 8, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=form != "not affine")
        self.relu = nn.ReLU6(inplace) if form == "relu6" else nn.ReLU(inplace)

    def forward(self, x):
        y = self.relu(self.bn1(self.one(x)))
        y = self.bn2(self.two(y))
        if self.form == "residual to the left":
            y = x + y
        elif self.form == "in place":
            y += x
        elif self.form == "in place on the other":
            other = x * 2
            shown = other.relu()
            other += y
            return self.relu(other) + shown
        elif self.form == "method":
            y = y.add(x)
        elif self.form == "broadcast":
            y = y + x.mean((2, 3), keepdim=True)
        elif self.form == "alpha":
            y = torch.add(y, x, alpha=2)
        elif self.form == "twice":
            y = y + y
        elif self.form == "number":
            y = y + 1
        elif self.form == "changed between":
            other = x * 2
            z = self.bn2(self.two(y))
            other.mul_(3)
            return z + other
        elif self.form == "changed in front":
            other = x * 2
            z = self.bn2(self.two(y))
            sum_ = z + other
            other.mul_(3)
            return sum_ + other
        elif self.form == "seen twice":
            return F.relu(y) + torch.sigmoid(y)
        elif self.form == "clamped":
            return F.hardtanh(y, -0.25, 0.75)
        elif self.form == "relu is input":
            return y.relu_() + x
        else:
            y = y + x
        return self.relu(y)


FORMS = [
    "plain", "no bias", "not affine", "relu6", "residual to the left", "in place", "in place on the other", "method",
    "broadcast", "alpha", "twice", "number", "changed between", "changed in front", "seen twice", "clamped",
    "relu is input",
]  # fmt: skip


EXPORTED_QUICKLY = ("plain", "relu6", "in place")
CAPTURES = [("concrete", form) for form in FORMS] + [
    pytest.param("export", form, marks=[] if form in EXPORTED_QUICKLY else pytest.mark.slow) for form in FORMS
]


@pytest.mark.parametrize("capture, form", CAPTURES)
def test_what_follows_a_convolution(form, capture):
    torch.manual_seed(1)
    model = randomised(Block(form)).double()
    x = torch.randn(2, 8, 6, 6).double()
    sparse, lowered = lowered_pair(model, x, capture=capture)
    assert len(fused(lowered)) >= 2
    for batch, size, layout in ((2, 6, None), (1, 6, None), (7, 6, None), (2, 11, torch.channels_last), (1, 1, None)):
        if capture == "export" and size != 6:
            continue  # the sizes of the example, by what export promises
        x = torch.randn(batch, 8, size, size).double() * 3
        x = x if layout is None else x.to(memory_format=layout)
        before = x.clone()
        found = lowered(x)
        assert torch.equal(x, before)
        torch.testing.assert_close(found, sparse(x), rtol=1e-10, atol=1e-10)


SINGLE = {
    "conv1d": (nn.Conv1d(6, 8, 3, padding=1, stride=2), (2, 6, 9)),
    "conv1d, same": (nn.Conv1d(6, 8, 5, padding="same", dilation=2), (2, 6, 9)),
    "grouped": (nn.Conv2d(8, 12, 3, groups=4, padding=1), (2, 8, 7, 7)),
    "depthwise": (nn.Conv2d(8, 16, 3, groups=8, stride=2), (2, 8, 7, 7)),
    "strides": (nn.Conv2d(4, 6, (3, 5), stride=(2, 3), padding=(2, 1)), (2, 4, 9, 11)),
    "stride beyond kernel": (nn.Conv2d(4, 6, 1, stride=3), (2, 4, 9, 11)),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=(2, 3), padding=(2, 3)), (2, 4, 9, 11)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 9, 11)),
    "stem": (nn.Conv2d(3, 8, 7, stride=2, padding=3), (1, 3, 19, 23)),
    "linear, one vector": (nn.Linear(12, 9), (12,)),
    "linear, several dimensions": (nn.Linear(12, 9), (2, 3, 5, 12)),
    "linear, no bias": (nn.Linear(12, 9, bias=False), (4, 12)),
    "one output": (nn.Linear(12, 1), (4, 12)),
    "one input": (nn.Conv2d(1, 5, 3), (4, 1, 5, 5)),
}


@pytest.mark.parametrize("name", SINGLE)
def test_single_layers(name):
    layer, shape = SINGLE[name]
    x = torch.randn(shape).double()
    sparse, lowered = lowered_pair(copy.deepcopy(layer).double(), x, 0.5)
    assert len(fused(lowered)) == 1
    torch.testing.assert_close(lowered(x), sparse(x), rtol=1e-11, atol=1e-11)
    strided = torch.randn(*shape, 2).double()[..., 0]
    torch.testing.assert_close(lowered(strided), sparse(strided), rtol=1e-11, atol=1e-11)
    if x.dim() > 1:
        for batch in (0, 1, 7):
            x = torch.randn(batch, *shape[1:]).double()
            torch.testing.assert_close(lowered(x), sparse(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["same, even kernel", "conv3d", "transposed", "padding modes"])
def test_what_has_no_kernel_stays_dense(name):
    layer, shape = {
        "same, even kernel": (nn.Conv2d(3, 4, 2, padding="same"), (2, 3, 5, 5)),
        "conv3d": (nn.Conv3d(3, 4, 2), (2, 3, 4, 4, 4)),
        "transposed": (nn.ConvTranspose2d(3, 4, 2), (2, 3, 5, 5)),
        "padding modes": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 5, 5)),
    }[name]
    x = torch.randn(shape).double()
    sparse, lowered = lowered_pair(layer.double(), x, 0.5)
    assert len(fused(lowered)) == (name == "padding modes")
    assert all(decision.lowered or decision.reason for decision in lowered.decisions)
    torch.testing.assert_close(lowered(x), sparse(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "name, size",
    [
        ("mobilenet_v2", 33),
        pytest.param("resnet18", 40, marks=pytest.mark.slow),
        ("shufflenet_v2_x0_5", 33),
        ("squeezenet1_1", 40),
        pytest.param("convnext_tiny", 32, marks=pytest.mark.slow),
        pytest.param("densenet121", 32, marks=pytest.mark.slow),
    ],
)
def test_torchvision(name, size):
    import torchvision

    torch.manual_seed(0)
    model = randomised(getattr(torchvision.models, name)(num_classes=10)).eval()
    sparse, lowered = lowered_pair(model, torch.randn(1, 3, size, size), 0.8)
    assert len(fused(lowered)) > len(sparse.sites) // 2
    with torch.no_grad():
        x = torch.randn(2, 3, size, size)
        expected = sparse(x)
        assert (lowered(x) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.refused is None])
def test_zoo(name, assert_same):
    """Every network lowers and computes the same, or each weight that stays dense has a reason."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxsparse.FxSparseWarning)
        sparse = fxsparse.sparsify(
            ZOO[name].make(), ZOO[name].example(), "static", sparsity=0.5, distribution="er", verify=False
        ).eval()
    lowered = sparse.lower(layers="all", verify=False)
    assert all(decision.lowered != bool(decision.reason) for decision in lowered.decisions)
    results = []
    for module in (copy.deepcopy(sparse), lowered):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(tensors(call(module, copy.deepcopy(ZOO[name].example()))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lenet5", "small_resnet", "wide_resnet22_2", "mobilenet_v1", "char_gru"])
def test_our_networks(name):
    torch.manual_seed(0)
    given = {"wide_resnet22_2": {"width": 1}, "mobilenet_v1": {"width": 0.125}}.get(name, {})
    size = {"size": 32} if name == "mobilenet_v1" else {}
    classes = {} if name == "char_gru" else {"num_classes": 10}
    model, x = models.build(name, **classes, **given), models.example_input(name, 2, **size)
    sparse, lowered = lowered_pair(randomised(model), x, 0.8)
    assert fused(lowered) or name == "char_gru"
    for one, other in zip(tensors(sparse(x)), tensors(lowered(x)), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)


def test_verification_notices_a_wrong_kernel(monkeypatch):
    sparse = masked(dtype=torch.float32)
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.mul_(1.5)
    assert sparse.lower(layers="all") is not None
    right = fxsparse.kernels.calls.sparse_conv2d_fused
    monkeypatch.setattr(fxsparse.kernels.calls, "sparse_conv2d_fused", lambda *args: right(*args) * 1.1)
    with pytest.raises(fxsparse.VerificationError, match="Net, lowered, differs from the masked module") as caught:
        sparse.lower(layers="all")
    assert "\n" not in str(caught.value)


def test_the_masked_module_is_left_as_it_was(assert_same):
    sparse = masked()
    sparse.train()
    before = copy.deepcopy(sparse.state_dict())
    lowered = sparse.lower(layers=["down*"])
    assert_same(before, sparse.state_dict())
    assert sparse.training and not lowered.training
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.zero_()
    assert lowered(torch.randn(2, 3, 8, 8).double()).abs().max() > 0
    with pytest.raises(fxsparse.SelectionError, match="layers"):
        sparse.lower(layers=["nothing"])
    with pytest.raises(fxsparse.ConfigError, match="layers: 'some' is none of auto, all"):
        sparse.lower(layers="some")
    assert "1 of 6 weights run on sparse kernels" in lowered.report()


def test_nan_and_infinity_go_where_they_go_in_the_masked_module():
    """Where a weight is active. Where none is, the masked one makes NaN of infinity times 0; the lowered does not."""
    sparse, lowered = lowered_pair(nn.Linear(4, 3).double(), torch.randn(1, 4).double(), 0.5)
    with torch.no_grad():
        sparse.masks["weight"].copy_(torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]]).bool())
    sparse.apply_masks_()
    lowered = sparse.lower(layers="all")
    x = torch.tensor([[float("nan"), 1.0, 0.0, 0.0], [float("inf"), 1.0, 0.0, 0.0]]).double()
    found = lowered(x)
    assert found[0].isnan().tolist() == [True, False, True]
    assert (~found[1].isfinite()).tolist() == [True, False, True]


def test_onnx_export_is_refused():
    pytest.importorskip("onnxscript")
    lowered = masked(dtype=torch.float32).lower(layers="all")
    with pytest.raises(Exception, match=r"ONNX has no operators for sparse kernels; export sparse\.fold\(\), which is"):
        torch.onnx.export(lowered, (torch.randn(2, 3, 8, 8),), dynamo=True, verbose=False)


def test_compiled():
    torch._dynamo.reset()
    lowered = masked().lower(layers="all")
    x = torch.randn(2, 3, 8, 8).double()
    compiled = torch.compile(lowered, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), lowered(x))


def test_masks_changed_in_place_hold_in_layers_that_stay_dense():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    x = torch.randn(2, 3, 9, 9)
    sparse = fxsparse.sparsify(model, x, method="static", sparsity=0.5, distribution="uniform").eval()
    sparse.masks["2.weight"][:, :4] = False
    torch.testing.assert_close(sparse.lower(layers=["0.weight"], verify=False)(x), sparse(x))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)])
def test_a_pooling_layer_with_a_hook_is_left_to_the_hook(pool):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), pool, nn.Conv2d(8, 4, 1))
    hook = pool.register_forward_hook(lambda module, args, output: output * 2)
    x = torch.randn(2, 3, 8, 8)
    sparse = fxsparse.sparsify(net, x, "static", sparsity=0.5).eval()
    hook.remove()
    torch.testing.assert_close(sparse.lower(layers="all", verify=False)(x), sparse(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "pool",
    [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(2), nn.MaxPool2d(2), nn.MaxPool2d(2, dilation=2)],
)
def test_no_images_give_no_results(pool):
    """Pools run on views of activations with channels outermost; an empty batch has nothing outermost."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), pool, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AvgPool2d(2))
    sparse, lowered = lowered_pair(randomised(net.eval()).double(), torch.randn(2, 3, 9, 9).double())
    for batch in (0, 1, 3):
        x = torch.randn(batch, 3, 9, 9).double()
        torch.testing.assert_close(lowered(x), sparse(x), rtol=1e-10, atol=1e-10)


def test_maxima_with_their_indices():
    class Indices(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 8, 3), nn.AdaptiveMaxPool2d(2, return_indices=True)

        def forward(self, x):
            maxima, indices = self.pool(self.conv(x))
            return maxima * indices

    x = torch.randn(2, 3, 9, 9).double()
    sparse, lowered = lowered_pair(Indices().double(), x)
    torch.testing.assert_close(lowered(x), sparse(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["conv2d", "conv1d", "linear", "max pool", "mean", "residual"])
def test_gradients_are_refused(kind):
    """Autograd would leave them out: `x.grad` None, or that of other ways to `x` alone."""
    images = torch.randn(2, 3, 9, 9)
    model, x = {
        "conv2d": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh()), images),
        "conv1d": (nn.Conv1d(9, 8, 3), images[0]),
        "linear": (nn.Linear(9, 4), images),
        "max pool": (nn.MaxPool2d(2), images),
        "mean": (nn.AdaptiveAvgPool2d(1), images),
        "residual": (Block("plain"), torch.randn(2, 8, 6, 6)),
    }[kind]
    if kind in ("max pool", "mean"):  # behind a layer that stays dense, which has gradients
        model = nn.Sequential(nn.Conv2d(3, 8, 1), model, nn.Conv2d(8, 4, 1))
        sparse = fxsparse.sparsify(model, x, "static", sparsity=0.5, verify=False).eval()
        lowered = sparse.lower(layers=["2.weight"])
        with torch.no_grad():
            expected = sparse(x)
        nodes = {getattr(node.target, "__name__", "") for node in lowered.graph.nodes}
        assert nodes & {"max_pool2d", "plane_mean"}
    else:
        sparse, lowered = lowered_pair(randomised(model.eval()), x, 0.5)
        expected = sparse(x).detach()
    wanting = x.clone().requires_grad_()
    found = lowered(wanting)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(fxsparse.InputError, match=r"lowered for inference has no gradients.*lower\(train=True\)") as e:
        found.sum().backward()
    assert "\n" not in str(e.value) and wanting.grad is None
    assert not lowered(x).requires_grad
    with torch.no_grad():
        assert not lowered(wanting).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_module_that_was_converted_after_its_capture(dtype):
    net = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    x = torch.randn(2, 3, 9, 9)
    sparse = fxsparse.sparsify(net, x, "static", sparsity=0.5).eval().to(dtype)
    lowered = sparse.lower(layers="all")
    assert [decision.lowered for decision in lowered.decisions] == [dtype == torch.float64] * 2
    if dtype == torch.bfloat16:
        assert lowered.report().count("it is torch.bfloat16; the kernels are for float32 and float64") == 2
    tolerance = 1e-10 if dtype == torch.float64 else 5e-2
    torch.testing.assert_close(lowered(x.to(dtype)), sparse(x.to(dtype)), rtol=tolerance, atol=tolerance)
    if dtype == torch.float64:
        sparse.lower(train=True, layers="all")
        sparse.lower(train=True, layers="all")  # whose graphs are lowered ones now
        torch.testing.assert_close(lowered(x.to(dtype)), sparse(x.to(dtype)), rtol=1e-10, atol=1e-10)


def test_only_finite_outputs_of_the_masked_module_are_compared(monkeypatch):
    """NaN of infinity times a masked 0 is no fault of the lowered layers; elsewhere they are still compared."""
    sparse, _ = lowered_pair(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)).double(), torch.randn(2, 4).double(), 0.5)
    with torch.no_grad():
        for mask in sparse.masks.values():
            mask.copy_(torch.eye(3, mask.shape[1]).bool())
        sparse.apply_masks_()
        sparse.get_parameter("0.bias")[0] = float("inf")  # times 0: NaN in outputs 1 and 2 of the masked module
    sparse.get_parameter("1.bias").data[:] = 1.0
    assert sparse(torch.randn(2, 4).double()).isnan()[:, 1:].all()
    assert sparse.lower(layers="all")(torch.randn(2, 4).double())[:, 1:].isfinite().all()
    with torch.no_grad():
        sparse.get_parameter("0.bias").zero_()
        sparse.get_parameter("1.bias")[0] = float("nan")
    right = fxsparse.kernels.calls.sparse_linear_fused
    assert sparse.lower(layers="all") is not None
    monkeypatch.setattr(fxsparse.kernels.calls, "sparse_linear_fused", lambda *args: right(*args) * 1.1)
    with pytest.raises(fxsparse.VerificationError, match="differs from the masked module"):
        sparse.lower(layers="all")


def test_a_lowered_module_is_not_lowered_again():
    lowered = masked().lower(layers=["down*"])
    for lower in (lowered.lower, lambda **options: fxsparse.lower(lowered, **options)):
        with pytest.raises(fxsparse.FxSparseError, match="lowered already; lower what sparsify returned"):
            lower(train=True)
