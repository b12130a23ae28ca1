"""Networks that compute another function in train mode than in eval mode."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .case import ZooCase, normal


class AuxiliaryHead(nn.Module):
    """Two outputs in train mode and one in eval mode, where the auxiliary head has no use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.auxiliary = nn.Linear(4, 3)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        x = F.relu(self.conv1(x))
        early = self.auxiliary(x.mean((2, 3))) if self.training else None
        x = F.relu(self.conv2(x))
        out = self.head(x.mean((2, 3)))
        if self.training:
            return out, early
        return out


class ModeSwitch(nn.Module):
    """Each mode has a layer of its own, and a branch nested in a submodule: neither graph has all sites."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fast = nn.Linear(8, 8)
            self.slow = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.slow(x) if self.training else self.fast(x)

    def __init__(self) -> None:
        super().__init__()
        self.branch = ModeSwitch.Branch()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.branch(x)))


class FunctionalDropout(nn.Module):
    """`F.dropout(training=self.training)`: plain tracing bakes the mode of the trace."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.relu(self.fc1(x)), p=0.5, training=self.training)
        return self.fc2(x)


class StochasticDepth(nn.Module):
    """Residual branches that are dropped per sample in train mode, with more chance the deeper."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def drop(self, x: Tensor, rate: float) -> Tensor:
        if not self.training or rate == 0:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - rate)
        return x * keep.div_(1 - rate)

    def forward(self, x: Tensor) -> Tensor:
        for depth, layer in enumerate(self.layers):
            x = x + self.drop(torch.relu(layer(x)), rate=0.2 * depth)
        return self.head(x)


class RandomNoise(nn.Module):
    """Noise drawn by factories in train mode: it must be drawn at every call, not once in the trace."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 8)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
            x = x * (0.5 + torch.rand(x.shape[0], 1, dtype=x.dtype, device=x.device))
        return self.fc2(torch.relu(self.fc1(x)))


class FrozenBatchNorm(nn.Module):
    """`train` is overridden so that the BatchNorm stays in eval mode, as in fine-tuning."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.train()

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn(self.conv(x))).mean((2, 3)))


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + checkpoint(self.block, x, use_reentrant=False)
        return self.head(torch.relu(x))


CASES = {
    "auxiliary_head": ZooCase(AuxiliaryHead, normal(2, 3, 8, 8), sites=4),
    "mode_switch": ZooCase(ModeSwitch, normal(4, 8), sites=3),
    "functional_dropout": ZooCase(FunctionalDropout, normal(4, 8), dropout=True, sites=2),
    "stochastic_depth": ZooCase(StochasticDepth, normal(4, 8), dropout=True, sites=4),
    "random_noise": ZooCase(RandomNoise, normal(4, 8), dropout=True, sites=2),
    "frozen_batch_norm": ZooCase(FrozenBatchNorm, normal(2, 3, 8, 8), sites=2),
    "checkpointed": ZooCase(Checkpointed, normal(4, 8), sites=3),
}
