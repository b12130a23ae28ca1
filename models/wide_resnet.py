"""WideResNet for CIFAR: the paper's section 4.3 and the report's section 4.1 use depth 22 and width 2.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016: a pre-activation residual network with three
stages of basic blocks on 32x32, 16x16 and 8x8 feature maps. Depth counts the stem, two convolutions a block
and one shortcut a stage, so `depth = 6 n + 4` for n blocks a stage.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .widths import scaled


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution, twice, around a shortcut: (N, in, H, W) to (N, out, H/s, W/s).

    Where the number of channels changes, the shortcut is a 1x1 convolution of the *activated* input;
    everywhere else it is the input itself.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.dropout = dropout
        self.shortcut: nn.Module | None = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        identity = x if self.shortcut is None else self.shortcut(out)
        out = F.relu(self.bn2(self.conv1(out)))
        if self.dropout > 0:
            out = F.dropout(out, self.dropout, training=self.training)
        return identity + self.conv2(out)


class WideResNet(nn.Module):
    """Wide residual network: images (N, in_channels, H, W), H and W divisible by 4, to logits (N, classes).

    `width` is the widening factor k of the literature: the stages have 16 k, 32 k and 64 k channels. It
    need not be whole. The stem has `stem` channels whatever the width, 16 in the source.
    Raises ValueError for a depth that is not 6 n + 4.
    """

    def __init__(
        self,
        depth: int = 22,
        width: float = 2,
        num_classes: int = 10,
        in_channels: int = 3,
        dropout: float = 0.0,
        stem: int = 16,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth is {depth}; a WideResNet has depth 6 n + 4, such as 10, 16, 22, 28, 40")
        narrow, middle, wide = scaled(16, width), scaled(32, width), scaled(64, width)
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        self.stage1 = _stage(blocks, stem, narrow, 1, dropout)
        self.stage2 = _stage(blocks, narrow, middle, 2, dropout)
        self.stage3 = _stage(blocks, middle, wide, 2, dropout)
        self.bn = nn.BatchNorm2d(wide)
        self.fc = nn.Linear(wide, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.stage3(self.stage2(self.stage1(x)))
        x = F.relu(self.bn(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int, dropout: float) -> nn.Sequential:
    first = PreActivationBlock(in_channels, out_channels, stride, dropout)
    rest = [PreActivationBlock(out_channels, out_channels, 1, dropout) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def wide_resnet22_2(
    num_classes: int = 10, in_channels: int = 3, width: float = 1.0, dropout: float = 0.0
) -> WideResNet:
    """WideResNet-22-2: for CIFAR-10 1,076,912 conv and linear weights in 23 tensors.

    157,730,048 MACs for a 32x32 image. `width` multiplies all channels, the stem's too, as the report does
    for its Small-Dense baseline.
    """
    return WideResNet(22, 2 * width, num_classes, in_channels, dropout, stem=scaled(16, width))
