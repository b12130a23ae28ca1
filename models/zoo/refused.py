"""Networks with regions and branches that a graph cannot hold; a tracer alone refuses most, without a trace left."""

import torch
from torch import Tensor, nn

from .case import ZooCase, normal


class DataBranch(nn.Module):
    """A branch on a value of the input: one graph cannot hold both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(8, 3)
        self.right = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return self.left(x)
        return self.right(x)


class DataLoop(nn.Module):
    """As many steps as a value of the input says, read by `int`."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().max()) + 1):
            x = torch.tanh(self.step(x))
        return x


class LayerDrop(nn.Module):
    """Whole layers skipped by a random draw in train mode: a trace would freeze one draw."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and torch.rand(()) < 0.3:
                continue
            x = x + torch.relu(layer(x))
        return self.head(x)


class AutocastRegion(nn.Module):
    """A layer under `autocast`, and one with it switched off: in a graph both would run in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            x = torch.relu(self.conv(x))
            with torch.autocast(x.device.type, enabled=False):
                x = x.float().mean((2, 3))
        return self.head(x)


CASES = {
    "data_branch": ZooCase(DataBranch, normal(4, 8), refused="branches on the value of a tensor"),
    "data_loop": ZooCase(DataLoop, normal(4, 8), refused="loops by the value of a tensor"),
    "layer_drop": ZooCase(LayerDrop, normal(4, 8), dropout=True, refused="branches on a random number in train mode"),
    "autocast_region": ZooCase(
        AutocastRegion, normal(2, 3, 8, 8), refused="an autocast region cannot be kept in a graph"
    ),
}
