"""Convolutions of every kind, and the structures that image networks build from them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import ZooCase, normal


class FunctionalConv(nn.Module):
    """A convolution without a module: its weight is a raw Parameter of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3) / 5)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, None, 1, 1)
        return self.head(F.relu(x).mean((2, 3)))


class FunctionalKeywords(nn.Module):
    """Functional calls with the weight as a keyword argument, in another order than the signature's."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3) / 5)
        self.up = nn.Parameter(torch.randn(4, 2, 2, 2) / 5)
        self.readout = nn.Parameter(torch.randn(3, 2) / 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(weight=self.kernel, padding="same", input=x))
        x = F.conv_transpose2d(x, stride=2, weight=self.up)
        return F.linear(bias=None, weight=self.readout, input=x.mean((2, 3)))


class Conv1d(nn.Module):
    """Convolutions over time: weights (out, in, kernel), one dilated and causally padded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, 4, 5, stride=2)
        self.conv2 = nn.Conv1d(4, 4, 3, dilation=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(F.pad(x, (4, 0))))
        return self.head(x.mean(2))


class Conv3d(nn.Module):
    """Convolutions over volumes with unequal kernel sides: weights (out, in, depth, height, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1))
        self.conv2 = nn.Conv3d(4, 4, (3, 1, 1), stride=(2, 1, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.head(F.adaptive_avg_pool3d(x, 1).flatten(1))


class ConvTranspose1d(nn.Module):
    """A transposed convolution over time: its weight is (in, out, kernel), the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(3, 6, 4, stride=2)
        self.up = nn.ConvTranspose1d(6, 3, 4, stride=2, groups=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.down(x)))


class ConvTranspose2d(nn.Module):
    """A transposed convolution called with `output_size`, taken from an earlier tensor's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.down(x))
        return self.up(y, output_size=x.shape[-2:])


class PaddingModes(nn.Module):
    """Circular, reflecting and replicating padding happen before the convolution, inside its module."""

    def __init__(self) -> None:
        super().__init__()
        self.circular = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
        self.reflect = nn.Conv2d(4, 4, (3, 5), padding=(1, 2), padding_mode="reflect")
        self.replicate = nn.Conv2d(4, 4, 3, padding="same", dilation=2, padding_mode="replicate")
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.circular(x))
        x = F.relu(self.reflect(x))
        return self.head(F.relu(self.replicate(x)).mean((2, 3)))


class StringPadding(nn.Module):
    """Padding given as a string, "same" with an even kernel (which pads unequally) and "valid"."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(3, 4, 4, padding="same")
        self.valid = nn.Conv2d(4, 4, 3, padding="valid")

    def forward(self, x: Tensor) -> Tensor:
        return self.valid(F.relu(self.same(x)))


class GroupedConv(nn.Module):
    """Grouped convolution with a channel shuffle: the weight's second dimension is per group."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 1, groups=2, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv1(x)))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(self.conv2(x)).mean((2, 3)))


class DepthwiseSeparable(nn.Module):
    """Depthwise convolution with a channel multiplier of 2, then a pointwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False)
        self.pointwise = nn.Conv2d(8, 6, 1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn(self.pointwise(self.depthwise(x))))
        return self.head(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    """Channels are scaled by a gate that is computed from their own mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.reduce = nn.Conv2d(8, 2, 1)
        self.expand = nn.Conv2d(2, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return self.head((x * torch.sigmoid(gate)).mean((2, 3)))


class DenseConcat(nn.Module):
    """Every layer reads the concatenation of all layers before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.head = nn.Linear(15, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(F.relu(layer(torch.cat(features, 1))))
        return self.head(torch.cat(features, 1).mean((2, 3)))


class UNet(nn.Module):
    """Skip connections that the decoder uses only where `isinstance` says that they are tensors.

    A proxy is no tensor, so a careless trace loses every skip and still runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(3, 4, 3, padding=1)
        self.down2 = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.bottom = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.up2 = nn.Conv2d(4, 4, 3, padding=1)
        self.up1 = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip1 = F.relu(self.down1(x))
        skip2 = F.relu(self.down2(skip1))
        y = F.relu(self.bottom(skip2))
        for layer, skip in ((self.up2, skip2), (self.up1, skip1), (None, None)):
            if not isinstance(skip, Tensor) or layer is None:
                continue
            y = F.interpolate(y, size=skip.shape[-2:], mode="nearest")
            y = F.relu(layer(y) + skip)
        return self.head(y)


class ScaledConv2d(nn.Conv2d):
    """A Conv2d subclass outside `torch.nn`, so that a tracer walks through its forward."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self._conv_forward(x, self.weight, self.bias)


class ClampedLinear(nn.Linear):
    """A Linear subclass outside `torch.nn` that computes by `super().forward`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-3, 3)


class Subclasses(nn.Module):
    """Subclasses of Conv2d and Linear: no search by `torch.nn` class finds their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = ScaledConv2d(3, 4, 3, padding=1)
        self.fc = ClampedLinear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).mean((2, 3))
        return self.head(self.fc(x))


IMAGES = normal(2, 3, 8, 8)

CASES = {
    "functional_conv": ZooCase(FunctionalConv, IMAGES, sites=2),
    "functional_keywords": ZooCase(FunctionalKeywords, IMAGES, sites=3),
    "conv1d": ZooCase(Conv1d, normal(2, 3, 16), sites=3),
    "conv3d": ZooCase(Conv3d, normal(2, 2, 5, 6, 6), sites=3),
    "conv_transpose1d": ZooCase(ConvTranspose1d, normal(2, 3, 16), sites=2),
    "conv_transpose2d": ZooCase(ConvTranspose2d, IMAGES, sites=2),
    "padding_modes": ZooCase(PaddingModes, IMAGES, sites=4),
    "string_padding": ZooCase(StringPadding, IMAGES, sites=2),
    "grouped_conv": ZooCase(GroupedConv, normal(2, 4, 6, 6), sites=3),
    "depthwise_separable": ZooCase(DepthwiseSeparable, normal(2, 4, 6, 6), sites=3),
    "squeeze_excite": ZooCase(SqueezeExcite, IMAGES, sites=4),
    "dense_concat": ZooCase(DenseConcat, IMAGES, sites=4),
    "unet": ZooCase(UNet, IMAGES, sites=6),
    "subclasses": ZooCase(Subclasses, IMAGES, sites=3),
}
