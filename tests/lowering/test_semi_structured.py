"""`lower("cuda")` without a device: what is decided, what the graph computes, what is refused.

A stand-in for the device's kernels packs a weight as 2 values of every 4 and their places, and unpacks it again: what
is not 2:4 would not come back.
"""

import copy

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse.kernels import semi_structured
from fxsparse.kernels.semi_structured import SemiStructuredKernels, semi_structured_conv, semi_structured_linear
from fxsparse.lowering.semi_structured import is_two_of_four, why_dense

MULTIPLES = {torch.bfloat16: (16, 16), torch.float32: (8, 8)}  # float32 so that numbers can be compared exactly


def packed_and_back(weight):
    groups = weight.reshape(weight.shape[0], -1, 4)
    places = (groups != 0).to(torch.int8).topk(2, dim=2).indices
    values = groups.gather(2, places)
    return torch.zeros_like(groups).scatter_(2, places, values).view(weight.shape)


@pytest.fixture
def kernels(monkeypatch):
    """Kernels for the CPU."""
    own = SemiStructuredKernels("stand-in", torch.device("cpu"), MULTIPLES, packed_and_back)
    monkeypatch.setattr(semi_structured, "find_kernels", lambda device: own)
    return own


class ConvNet(nn.Module):
    """1x1 convolutions, one of each kind that is none, and a head whose rows are no multiple of 8."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one = nn.Conv2d(16, 24, 1)
        self.norm = nn.BatchNorm2d(24)
        self.strided = nn.Conv2d(24, 24, 1, stride=2, bias=False)
        self.grouped = nn.Conv2d(24, 24, 1, groups=3)
        self.padded = nn.Conv2d(24, 24, 1, padding=1)
        self.viewed = nn.Conv2d(24, 24, 1)
        self.line = nn.Conv1d(24, 16, 1, bias=False)
        self.hidden = nn.Linear(16, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.norm(self.one(self.stem(x).relu())).relu()
        x = self.viewed(self.padded(self.grouped(self.strided(x))))
        x = x.view(x.shape[0], -1)  # which wants its channels outermost in memory
        x = self.line(x.unflatten(1, (24, -1))).transpose(1, 2)
        return self.head(self.hidden(x).relu())


def lowered_pair(model, x, granularity="2:4", dtype=torch.float32, **options):
    torch.manual_seed(0)
    sparse = fxsparse.sparsify(model, x, "static", granularity=granularity, **options).eval().to(dtype)
    return sparse, sparse.lower("cuda", verify=False)


def calls(module):
    return [n.name for n in module.graph.nodes if n.target in (semi_structured_conv, semi_structured_linear)]


def test_a_convolutional_net_computes_the_same(kernels):
    x = torch.randn(4, 3, 8, 8)
    torch.manual_seed(1)
    sparse, lowered = lowered_pair(ConvNet(), x)
    assert calls(lowered) == ["conv2d_1", "conv2d_5", "conv1d", "linear"]
    for batch in (4, 1, 7):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(lowered(x), sparse(x), rtol=1e-5, atol=1e-5)
    reasons = {decision.name: decision.reason for decision in lowered.decisions}
    assert reasons == {
        "stem.weight": "a convolution is a linear where its kernel is 1x1, its stride 1, without groups and padding",
        "one.weight": "",
        "strided.weight": "a convolution is a linear where its kernel is 1x1, its stride 1, without groups and padding",
        "grouped.weight": "a convolution is a linear where its kernel is 1x1, its stride 1, without groups and padding",
        "padded.weight": "a convolution is a linear where its kernel is 1x1, its stride 1, without groups and padding",
        "viewed.weight": "",
        "line.weight": "",
        "hidden.weight": "",
        "head.weight": "stand-in takes multiples of 8x8, and it is 10x32",
    }
    assert lowered.report().startswith("4 of 9 weights run on sparse kernels")
    with pytest.raises(fxsparse.InputError, match="lowered for inference"):
        lowered.train()


def test_a_transformer_computes_the_same(kernels):
    """Both projections of attention are reached, and the masked module is left as it was."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True, activation="gelu")
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(3, 5, 32)
    sparse, lowered = lowered_pair(encoder, x)
    before = copy.deepcopy(sparse.state_dict())
    assert len(calls(lowered)) == 8 == len(sparse.sites)
    assert all(decision.lowered for decision in lowered.decisions)
    torch.testing.assert_close(lowered(x), sparse(x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in sparse.state_dict().items())
    assert sparse.lower("cuda").report() == lowered.report()  # verified


def test_it_compiles_without_a_break(kernels):
    x = torch.randn(4, 3, 8, 8)
    sparse, lowered = lowered_pair(ConvNet(), x)
    compiled = torch.compile(lowered, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), sparse(x), rtol=1e-5, atol=1e-5)


def test_a_1x1_convolution_copies_nothing_of_channels_last():
    weight, bias = torch.randn(16, 8), torch.randn(16)
    x = torch.randn(2, 8, 5, 6).to(memory_format=torch.channels_last)
    seen = []

    class Linear(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.linear:
                seen.append(args[0].data_ptr())
            return func(*args, **(kwargs or {}))

    with Linear():
        y = semi_structured_conv(x, weight, bias)
    assert seen == [x.data_ptr()]
    assert y.is_contiguous(memory_format=torch.channels_last)
    expected = nn.functional.conv2d(x, weight[..., None, None], bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert semi_structured_linear(x.permute(0, 2, 3, 1).transpose(0, 1), weight).is_contiguous()


@pytest.mark.filterwarnings("ignore:no weight runs on semi-structured kernels")
@pytest.mark.parametrize("granularity", ["1:4", "4:8", "weight", (4, 1)])
def test_any_mask_that_is_two_of_four(kernels, granularity):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    x = torch.randn(4, 32)
    given = {} if ":" in granularity else {"sparsity": 0.5, "distribution": {"*": 0.5}}
    sparse, lowered = lowered_pair(model, x, granularity, **given)
    reasons = {decision.reason for decision in lowered.decisions}
    assert reasons == ({""} if granularity == "1:4" else {"its mask is not 2:4 along the input dimension"})
    torch.testing.assert_close(lowered(x), sparse(x), rtol=1e-5, atol=1e-5)


def test_the_reasons_of_a_weight(kernels):
    ones = torch.ones(16, 32, dtype=torch.bool)
    two = ones.clone()
    two[:, 0::4] = two[:, 1::4] = False
    weight = torch.zeros(16, 32, dtype=torch.bfloat16)
    assert why_dense(weight, two, kernels) == ""
    assert why_dense(weight, ones, kernels) == "no weight of it is masked out"
    assert why_dense(weight.half(), two, kernels).startswith(
        "it is float16; convert the module first: sparse.to(torch.b"
    )
    assert why_dense(weight.to("meta"), two, kernels) == "it is on meta, and the kernels are for cpu"
    assert why_dense(weight[:12], two[:12], kernels) == "stand-in takes multiples of 16x16, and it is 12x32"
    assert not is_two_of_four(torch.zeros(4, 6, dtype=torch.bool))
    three = two.clone()
    three[3, 0] = True
    assert is_two_of_four(two) and not is_two_of_four(three)


def test_layers_by_name(kernels):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    x = torch.randn(4, 32)
    sparse, _ = lowered_pair(model, x)
    lowered = sparse.lower("cuda", layers=["2.*"])
    assert [decision.lowered for decision in lowered.decisions] == [False, True]
    assert lowered.decisions[0].reason == "not among the layers that were asked for"
    with pytest.raises(fxsparse.SelectionError, match=r"'3\.weight' matches no weight site"):
        sparse.lower("cuda", layers=["3.weight"])


def test_a_module_that_was_captured_in_another_precision(kernels):
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Flatten(), nn.Linear(64, 16))
    sparse, lowered = lowered_pair(model, torch.randn(2, 3, 2, 2), dtype=torch.bfloat16)
    assert [decision.lowered for decision in lowered.decisions] == [False, True]
    x = torch.randn(2, 3, 2, 2, dtype=torch.bfloat16)
    torch.testing.assert_close(lowered(x), sparse(x))
    assert fxsparse.lower(sparse, "cuda").example[0][0].dtype == torch.bfloat16  # verified, in its own precision


def test_a_warning_where_nothing_can_be_lowered(kernels):
    sparse = fxsparse.sparsify(nn.Sequential(nn.Linear(32, 32)), torch.randn(2, 32), granularity="2:4").half()
    with pytest.warns(
        fxsparse.FxSparseWarning, match=r"no weight runs on semi-structured kernels \(0\.weight: it is fl"
    ):
        sparse.lower("cuda", verify=False)


def test_masks_are_what_counts_not_what_is_stored(kernels):
    """Inactive weights that somebody wrote to take no part."""
    x = torch.randn(4, 32)
    sparse, _ = lowered_pair(nn.Sequential(nn.Linear(32, 32)), x)
    with torch.no_grad():
        sparse.get_parameter("0.weight").add_(1.0)
    torch.testing.assert_close(sparse.lower("cuda")(x), sparse(x), rtol=1e-5, atol=1e-5)


def test_torch_packs_and_unpacks_our_masks():
    """torch's own packed format of CUTLASS, whose conversion is plain tensor code, gives the weight back."""
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    sparse = fxsparse.sparsify(nn.Sequential(nn.Linear(64, 32)), torch.randn(2, 64), "set", granularity="2:4")
    weight = sparse.get_parameter("0.weight").detach().half()
    packed = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(*packed), weight)
    wrong = torch.ones_like(weight)
    packed = conversions.sparse_semi_structured_from_dense_cutlass(wrong)
    assert not torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(*packed), wrong)


# -- devices --------------------------------------------------------------------------------------------------


@pytest.fixture
def sparse():
    return fxsparse.sparsify(nn.Sequential(nn.Linear(32, 32)), torch.randn(2, 32), granularity="2:4")


def pretend(monkeypatch, capability, cusparselt):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Device")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: cusparselt)


def test_no_device(sparse, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(fxsparse.ConfigError, match=r"there is no CUDA device here; lower\(\) without backend= has"):
        sparse.lower("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(fxsparse.ConfigError, match="this torch is built without CUDA; lower"):
        sparse.lower(backend="cuda")


def test_what_a_device_has(sparse, monkeypatch):
    cuda = torch.device("cuda")
    pretend(monkeypatch, (9, 0), True)
    found = semi_structured.find_kernels(cuda)
    assert found.name == "cuSPARSELt" and set(found.multiples) == {torch.float16, torch.bfloat16}
    with pytest.raises(fxsparse.ConfigError, match=r"the module is on cpu; move it first: sparse\.to\('cuda'\)"):
        sparse.lower("cuda")
    pretend(monkeypatch, (8, 6), False)
    assert semi_structured.find_kernels(cuda).name == "CUTLASS"
    pretend(monkeypatch, (9, 0), False)
    with pytest.raises(fxsparse.ConfigError, match=r"no cuSPARSELt, and Device \(compute capability 9\.0\) needs it"):
        semi_structured.find_kernels(cuda)
    pretend(monkeypatch, (7, 5), True)
    with pytest.raises(fxsparse.ConfigError, match=r"Device has compute capability 7\.5, and 2:4 kernels need 8\.0 or"):
        semi_structured.find_kernels(cuda)


def test_training_is_refused(sparse):
    with pytest.raises(
        fxsparse.ConfigError, match="training on sparse kernels is for the CPU; on a GPU, train the mas"
    ):
        sparse.lower("cuda", train=True)
