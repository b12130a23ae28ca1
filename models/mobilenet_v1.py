"""MobileNet-v1 with a width multiplier (the paper's section 4.1.2).

Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", 2017,
table 1. The paper leaves the first and the depthwise convolutions dense; they carry the names `stem.conv`
and `blocks.<i>.depthwise`.
"""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from .widths import scaled

# (output channels at width 1, stride) of the thirteen depthwise separable blocks
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


class SeparableBlock(nn.Module):
    """A 3x3 depthwise and a 1x1 pointwise convolution, each with BatchNorm and ReLU.

    (N, in, H, W) to (N, out, H/s, W/s).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.pointwise_bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise_bn(self.depthwise(x)))
        return F.relu(self.pointwise_bn(self.pointwise(x)))


class MobileNetV1(nn.Module):
    """MobileNet-v1: images (N, in_channels, H, W), at least 32x32 to be useful, to logits (N, num_classes).

    `width` multiplies the channels of every layer but the classifier's outputs.
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, width: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        channels = scaled(32, width)
        self.stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(in_channels, channels, 3, stride=2, padding=1, bias=False),
                bn=nn.BatchNorm2d(channels),
                relu=nn.ReLU(inplace=True),
            )
        )
        self.blocks = nn.Sequential()
        for out_channels, stride in BLOCKS:
            self.blocks.append(SeparableBlock(channels, scaled(out_channels, width), stride))
            channels = scaled(out_channels, width)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.classifier(self.dropout(x))


def mobilenet_v1(
    num_classes: int = 1000, in_channels: int = 3, width: float = 1.0, dropout: float = 0.0
) -> MobileNetV1:
    """MobileNet-v1: for 1000 classes 568,740,352 MACs for a 224x224 image."""
    return MobileNetV1(num_classes, in_channels, width, dropout)
