"""A small residual network for small pictures, 8x8 to 32x32: the demonstration's model.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, with one basic block a
stage (n = 1, the 8-layer member of the CIFAR family) and 1x1 convolutions on the shortcuts.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .widths import scaled


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut: (N, in, H, W) to (N, out, H/s, W/s)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module | None = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + identity)


class SmallResNet(nn.Module):
    """Three stages of `width`, 2 `width` and 4 `width` channels, with `blocks` basic blocks each.

    Images (N, in_channels, H, W) to logits (N, num_classes). `width` need not be whole.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: float = 16, blocks: int = 1) -> None:
        super().__init__()
        channels = scaled(1, width)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.stages = nn.Sequential()
        for multiple, stride in ((1, 1), (2, 2), (4, 2)):
            for index in range(blocks):
                self.stages.append(BasicBlock(channels, scaled(multiple, width), stride if index == 0 else 1))
                channels = scaled(multiple, width)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.bn1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def small_resnet(num_classes: int = 10, in_channels: int = 1, width: float = 16, blocks: int = 1) -> SmallResNet:
    """The demonstration's network: for 8x8 grey pictures in 10 classes 77,072 conv and linear weights."""
    return SmallResNet(num_classes, in_channels, width, blocks)
