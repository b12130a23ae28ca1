"""torchvision's networks: every classification family in numbers, everything but the detectors captured."""

import copy
import warnings

import pytest
import torch
from torch import Tensor
from torchvision import models

import fxsparse

DETECTORS = models.list_models(module=models.detection)
VIDEO = models.list_models(module=models.video)
REST = sorted(set(models.list_models()) - set(DETECTORS))
MASKED = ("conv2d", "conv3d", "linear", "conv1d")

SIDES = {"inception_v3": 299, "vit_b_16": 224, "maxvit_t": 224}
"""Side of the picture: the least that the network takes; 64 for the others."""


def smallest_of_every_family():
    """The member with the fewest parameters of each of torchvision's modules (`resnet.py`, `vgg.py`, ...)."""

    def parameters(name):
        return min(weights.meta["num_params"] for weights in models.get_model_weights(name))

    families = {}
    for name in models.list_models(module=models):
        families.setdefault(models.get_model_builder(name).__module__, []).append(name)
    return sorted(min(names, key=parameters) for names in families.values())


def build(name, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return models.get_model(name, weights=None, **options)


def sparsify(model, example, sparsity=0.0, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxsparse.FxSparseWarning)
        return fxsparse.sparsify(model, example, sparsity=sparsity, **options)


def logits(output):
    """The tensors of an output: a tensor, GoogLeNet's and Inception's named tuple, a dict of maps, a list."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for tensor in (output.values() if isinstance(output, dict) else output) if tensor is not None]


def run(model, *example):
    torch.manual_seed(1)  # dropout and stochastic depth
    return model(*example)


def compare(model, sparse, example, assert_same, gradients=True):
    assert [key for key in sparse.state_dict() if not key.endswith("_mask")] == list(model.state_dict())
    for mode in ("eval", "train"):
        model.train(mode == "train")
        sparse.train(mode == "train")
        expected, actual = run(model, *example), run(sparse, *example)
        assert_same(expected, actual)
    if gradients:
        for output in (expected, actual):
            sum(tensor.square().sum() for tensor in logits(output)).backward()
    ours, buffers = dict(sparse.named_parameters()), dict(sparse.named_buffers())
    for key, parameter in model.named_parameters():
        assert_same(parameter.grad, ours[key].grad)
    for key, buffer in model.named_buffers():
        assert_same(buffer, buffers[key])


def test_there_are_seventeen_families():
    names = smallest_of_every_family()
    assert len(names) == 17
    assert {"resnet18", "googlenet", "inception_v3", "vit_b_16", "swin_t", "maxvit_t"} <= set(names)


@pytest.mark.parametrize("name", smallest_of_every_family())
def test_a_classifier_equals_eager(name, assert_same):
    torch.manual_seed(0)
    model = build(name)
    side = SIDES.get(name, 64)
    x = torch.randn(2, 3, side, side)
    sparse = sparsify(model, x, verify=False)
    assert sum(site.numel for site in sparse.sites) + sum(
        torch.Size(item.shape).numel() for item in sparse.uncovered
    ) == sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    compare(model, sparse, (x,), assert_same)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_outputs_come_in_train_mode_only(name):
    with torch.device("meta"):
        model = build(name)
        x = torch.randn(2, 3, 299, 299)
    sparse = sparsify(model, x)
    assert isinstance(sparse.eval()(x), Tensor)
    output = sparse.train()(x)
    assert type(output) is type(model.train()(x)) and output._fields == model(x)._fields
    assert any("aux" in site.name.lower() for site in sparse.sites)


@pytest.mark.parametrize(("name", "layers"), [("resnet18", 21), ("mobilenet_v2", 53), ("densenet121", 121)])
def test_masked_classifiers_equal_multiplied_weights(name, layers, assert_same):
    """The numbers of layers follow from the architecture: 18 and 3 shortcuts; 17 blocks of 2 or 3; 121."""
    torch.manual_seed(0)
    model = build(name)
    x = torch.randn(2, 3, 64, 64)
    sparse = sparsify(model, x, sparsity=0.8, verify=False)
    assert len(sparse.sites) == layers
    assert sparse.sparsity == pytest.approx(0.8, abs=layers / sum(site.numel for site in sparse.sites))
    multiplied = copy.deepcopy(model)
    for key, mask in sparse.masks.items():
        multiplied.get_parameter(key).data.mul_(mask)
    compare(multiplied, sparse, (x,), assert_same, gradients=False)


def options_of(name):
    if name.startswith("quantized_"):
        return {"quantize": False}
    return {"weights_backbone": None} if name in models.list_models(module=models.segmentation) else {}


def example_of(name):
    """The least that every network of a kind takes."""
    if name.startswith("raft"):
        return tuple(torch.rand(2, 1, 3, 128, 128).unbind())
    if name in VIDEO:
        frames, side = (16, 224) if name.startswith(("mvit", "s3d")) else (8, 112)
        return (torch.randn(2, 3, frames, side, side),)
    side = 299 if "inception" in name else 224
    return (torch.randn(2, 3, side, side),)


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_everything_but_the_detectors_is_captured(name):
    """Without data, on the meta device, so that size does not matter."""
    try:
        with torch.device("meta"):
            model, example = build(name, **options_of(name)), example_of(name)
    except (RuntimeError, NotImplementedError):  # the RegNets' and the quantizable ones' constructors need data
        if name == "regnet_y_128gf":
            pytest.skip("takes 5 GB to construct; the other RegNets are the same code")
        model, example = build(name, **options_of(name)), example_of(name)
    sparse = sparsify(model, example, sparsity=0.9, verify=False)
    covered = {site.name for site in sparse.sites} | {item.name for item in sparse.uncovered}
    assert covered == {key for key, parameter in model.named_parameters() if parameter.ndim > 1}
    assert [key for key in sparse.state_dict() if not key.endswith("_mask")] == list(model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["fcn_resnet50", "lraspp_mobilenet_v3_large", "r3d_18", "mc3_18", "r2plus1d_18", "s3d", "swin3d_t"]
)
def test_other_tasks_equal_eager(name, assert_same):
    torch.manual_seed(0)
    model = build(name, **options_of(name))
    side = 224 if name == "s3d" else 112
    example = tuple(tensor[..., :side, :side] for tensor in example_of(name))
    compare(model, sparsify(model, example, verify=False), example, assert_same)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mvit_v2_s", "raft_small", "vgg11_bn", "swin_v2_t", "efficientnet_v2_s", "regnet_x_400mf"]
)
def test_unlike_relatives_equal_eager(name, assert_same):
    torch.manual_seed(0)
    model = build(name)
    example = example_of(name)
    compare(model, sparsify(model, example, verify=False), example, assert_same)
