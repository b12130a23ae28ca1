"""The paper's and the report's networks, torchvision's by name, and a zoo of networks hard to capture."""

from .char_gru import CharGRU, char_gru
from .lenet import LeNet5, lenet5
from .mobilenet_v1 import MobileNetV1, mobilenet_v1
from .registry import build, canonical, default_width, example_input, has_width, names, takes_text
from .resnet_cifar import CifarResNet, resnet50_cifar
from .small_resnet import SmallResNet, small_resnet
from .wide_resnet import WideResNet, wide_resnet22_2

__all__ = [
    "CharGRU",
    "CifarResNet",
    "LeNet5",
    "MobileNetV1",
    "SmallResNet",
    "WideResNet",
    "build",
    "canonical",
    "char_gru",
    "default_width",
    "example_input",
    "has_width",
    "lenet5",
    "mobilenet_v1",
    "names",
    "resnet50_cifar",
    "small_resnet",
    "takes_text",
    "wide_resnet22_2",
]
