"""Published and agreed numbers: the ratios of the issue, the paper's notebook, the report's table."""

import pytest
import torch
from torch import nn

import fxsparse.models as models
from fxsparse.flops import plan_flops


def on_meta(name):
    with torch.device("meta"):
        return models.build(name), models.example_input(name, batch=1).to("meta")


RATIOS = {
    ("wide_resnet22_2", "erk"): {0.8: 0.3521, 0.9: 0.1735},
    ("wide_resnet22_2", "uniform"): {0.8: 0.2022, 0.9: 0.1025},
    ("resnet50_cifar", "erk"): {0.8: 0.3851, 0.9: 0.2247},
    ("resnet50_cifar", "uniform"): {0.8: 0.2011, 0.9: 0.1012},
    ("resnet50", "erk"): {0.8: 0.4138, 0.9: 0.2418},
    ("resnet50", "uniform"): {0.8: 0.2231, 0.9: 0.1260},
}


@pytest.mark.parametrize(("name", "distribution"), RATIOS)
def test_ratios_to_dense(name, distribution):
    model, x = on_meta(name)
    for sparsity, ratio in RATIOS[name, distribution].items():
        report = plan_flops(model, x, sparsity=sparsity, distribution=distribution)
        assert report.ratio == pytest.approx(ratio, abs=1e-4)


class ConvClassifier(nn.Module):
    """A linear layer as a 1x1 convolution: how Keras's MobileNet classifies, which ERK takes notice of."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        return self.conv(x[:, :, None, None]).flatten(1)


@pytest.fixture(scope="module")
def keras_mobilenet():
    model, x = on_meta("mobilenet_v1")
    with torch.device("meta"):
        model.classifier = ConvClassifier(1024, 1000)
    return model, x


def test_micronet_convention_gives_the_notebooks_dense_figure(keras_mobilenet):
    for model in (keras_mobilenet[0], on_meta("mobilenet_v1")[0]):
        assert plan_flops(model, keras_mobilenet[1]).under("micronet").flops / 1e6 == pytest.approx(1141.544, abs=5e-4)


# Outputs stored in rigl/imagenet_resnet/colabs/MobileNet_Counting.ipynb of google-research/rigl.
NOTEBOOK = {
    (0.75, "erk"): 599.144,
    (0.85, "erk"): 439.152,
    (0.90, "erk"): 334.134,
    (0.95, "erk"): 205.281,
    (0.75, "uniform"): 330.769,
    (0.85, "uniform"): 222.666,
    (0.90, "uniform"): 168.614,
    (0.95, "uniform"): 114.563,
}


@pytest.mark.parametrize(("sparsity", "distribution"), NOTEBOOK)
def test_micronet_convention_gives_the_notebooks_sparse_figures(keras_mobilenet, sparsity, distribution):
    model, x = keras_mobilenet
    report = plan_flops(model, x, sparsity=sparsity, distribution=distribution, exclude="depthwise")
    mega = report.under("micronet").flops / 1e6
    # In ERK's equation the notebook floors the number of zeros of every layer, which shifts the third decimal.
    floors = distribution == "erk" and sparsity > 0.75
    assert mega == pytest.approx(NOTEBOOK[sparsity, distribution], abs=5e-3 if floors else 5e-4)


# `sparse_flops x` of google-research/rigl's README, "1x training results", for ResNet-50 at 224 pixels.
README = {("erk", 0.8): 0.42, ("uniform", 0.8): 0.23, ("erk", 0.9): 0.24, ("uniform", 0.9): 0.13}


@pytest.mark.parametrize(("distribution", "sparsity"), README)
def test_micronet_convention_gives_the_papers_resnet50_ratios(distribution, sparsity):
    model, x = on_meta("resnet50")
    report = plan_flops(model, x, sparsity=sparsity, distribution=distribution).under("micronet")
    assert round(report.ratio, 2) == README[distribution, sparsity]
    assert report.dense_flops / 1e9 == pytest.approx(8.2, abs=0.05)
