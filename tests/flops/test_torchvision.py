"""Dense totals against `FlopCounterMode`, which is right for these models on meta tensors."""

import pytest
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

import fxsparse

NAMES = torchvision.models.list_models(module=torchvision.models)
QUICK = ("alexnet", "mobilenet_v2", "googlenet", "swin_v2_t", "vit_b_32", "shufflenet_v2_x0_5")


def build(name):
    size = 299 if name == "inception_v3" else 224
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    make = torchvision.models.get_model
    if name.startswith("regnet"):  # its constructor reads values, which meta tensors do not have
        return make(name, **options).eval(), torch.empty(1, 3, size, size)
    with torch.device("meta"):
        return make(name, **options).eval(), torch.empty(1, 3, size, size)


def test_there_are_80_classification_models():
    assert len(NAMES) == 80


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_dense_macs_of(name):
    model, x = build(name)
    report = fxsparse.count_flops(model, x)
    assert not report.unknown
    with FlopCounterMode(display=False) as counter:
        model.to("meta")(x.to("meta"))
    assert report.dense_flops == report.flops == counter.get_total_flops()


def test_dense_macs_of_the_issue():
    import fxsparse.models as models

    expected = {
        "wide_resnet22_2": 157_730_048,
        "resnet50_cifar": 1_298_014_208,
        "resnet50": 4_089_184_256,
        "mobilenet_v1": 568_740_352,
        "mobilenet_v2": 300_774_272,
    }
    for name, macs in expected.items():
        with torch.device("meta"):
            model = models.build(name)
        assert fxsparse.count_flops(model, models.example_input(name, batch=1).to("meta")).dense_macs == macs
