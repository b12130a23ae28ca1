"""ResNet-50 for CIFAR-100 as the report trains it (section 4.1; architecture in its supplement).

The ImageNet network's 7x7 stem and max pool give way to one 3x3 convolution without stride, so that a
32x32 image reaches the first stage at full size. The downsampling convolution of a bottleneck is its 3x3.
The last BatchNorm of every block starts at zero, so that each block starts as its shortcut (section 4.2).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .widths import scaled


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up to four times `channels`, around a shortcut.

    (N, in, H, W) to (N, out, H/s, W/s).
    """

    def __init__(self, in_channels: int, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module | None = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + identity)


class CifarResNet(nn.Module):
    """Bottleneck ResNet for small images: (N, in_channels, H, W) to logits (N, num_classes).

    `blocks` gives the number of bottlenecks in each of the four stages, whose 3x3 convolutions have 64, 128,
    256 and 512 channels times `width`; the stem's 64 channels scale as well.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        num_classes: int = 100,
        in_channels: int = 3,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        stem = scaled(64, width)
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1, channels = _stage(blocks[0], stem, 64, width, stride=1)
        self.layer2, channels = _stage(blocks[1], channels, 128, width, stride=2)
        self.layer3, channels = _stage(blocks[2], channels, 256, width, stride=2)
        self.layer4, channels = _stage(blocks[3], channels, 512, width, stride=2)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _stage(blocks: int, in_channels: int, base: int, width: float, stride: int) -> tuple[nn.Sequential, int]:
    """The stage's blocks and the number of channels that leave it."""
    channels, out_channels = scaled(base, width), scaled(4 * base, width)
    first = Bottleneck(in_channels, channels, out_channels, stride)
    rest = [Bottleneck(out_channels, channels, out_channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest), out_channels


def resnet50_cifar(num_classes: int = 100, in_channels: int = 3, width: float = 1.0) -> CifarResNet:
    """ResNet-50 for CIFAR: for 100 classes 23,652,032 conv and linear weights in 54 tensors.

    1,298,014,208 MACs for a 32x32 image.
    """
    return CifarResNet((3, 4, 6, 3), num_classes, in_channels, width)
