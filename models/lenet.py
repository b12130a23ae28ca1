"""LeNet-5 (LeCun et al., "Gradient-based learning applied to document recognition", Proc. IEEE 1998).

With the changes that are usual today: ReLU, max pooling, every map of the second convolution connected to all of the
first, and batch normalisation, without which it does not begin to learn at a density of a twentieth.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .widths import scaled


class LeNet5(nn.Module):
    """Two 5x5 convolutions and three linear layers: (N, in_channels, H, W) to logits (N, num_classes).

    `width` scales the 6 and 16 channels and the 120 and 84 units. Made for 32x32 pixels; other sizes from 20x20 on are
    pooled to the same 5x5.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: float = 1.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, scaled(6, width), 5)
        self.bn1 = nn.BatchNorm2d(scaled(6, width))
        self.conv2 = nn.Conv2d(scaled(6, width), scaled(16, width), 5)
        self.bn2 = nn.BatchNorm2d(scaled(16, width))
        self.fc1 = nn.Linear(scaled(16, width) * 5 * 5, scaled(120, width))
        self.bn3 = nn.BatchNorm1d(scaled(120, width))
        self.fc2 = nn.Linear(scaled(120, width), scaled(84, width))
        self.bn4 = nn.BatchNorm1d(scaled(84, width))
        self.fc3 = nn.Linear(scaled(84, width), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.adaptive_max_pool2d(F.relu(self.bn2(self.conv2(x))), 5)
        x = F.relu(self.bn3(self.fc1(x.flatten(1))))
        return self.fc3(F.relu(self.bn4(self.fc2(x))))


def lenet5(num_classes: int = 10, in_channels: int = 1, width: float = 1.0) -> LeNet5:
    """LeNet-5: 61,470 weights in five tensors, of pictures with three channels 61,770."""
    return LeNet5(num_classes, in_channels, width)
