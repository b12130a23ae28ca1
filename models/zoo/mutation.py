"""Networks that change tensors, buffers or attributes in place."""

import torch
from torch import Tensor, nn

from .case import ZooCase, normal


class InplaceAlias(nn.Module):
    """`y = x; x += 1` changes y too; an out-of-place add in the graph would not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        y = x
        x += 1
        flat = x.view(-1)
        flat *= 2
        return self.head(torch.tanh(x) + y)


class InplaceSlice(nn.Module):
    """Assignment to slices, `x[:, 0] = 0` and by an ellipsis, and an in-place add to one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        x[:, 0] = 0
        x[:, 1:3] += 1
        x[..., -1] = x[..., 2].detach()
        return self.head(torch.sin(x))


class InplaceActivation(nn.Module):
    """`relu_` and `nn.ReLU(inplace=True)` on a tensor that a shortcut still holds: it holds the result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        identity = x
        x = self.conv2(self.relu(x))
        x += identity
        return self.head(x.relu_().mean((2, 3)))


class InplaceUnusedResult(nn.Module):
    """In-place calls whose result nobody reads: dead code to a careless elimination, yet alive."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        x.mul_(0.5)
        torch.clamp_(x, min=-0.2)
        scratch = torch.empty_like(x)
        scratch.fill_(0.25)
        x.add_(scratch)
        return self.head(x)


class DiscardedBatchNorm(nn.Module):
    """A BatchNorm called for its statistics only: its output is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.monitor = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc(x))
        self.monitor(x.detach())
        return self.head(x - self.monitor.running_mean)  # type: ignore[operator]


class RunningCounter(nn.Module):
    """A buffer that counts calls with `add_` and takes part in the output."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.fc(x) / self.calls.sqrt()


class AugmentedCounter(nn.Module):
    """`self.calls += 1` on a buffer: in place, and then bound to the attribute again."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.fc(x) + self.calls


class RunningMean(nn.Module):
    """Exponential moving statistics kept by hand: moved in train mode, read in eval mode."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        mean = self.mean
        if self.training:
            mean = x.mean(0)
            self.mean.mul_(0.9).add_(mean.detach(), alpha=0.1)
        return self.head(torch.relu(x - mean))


class AttributeCache(nn.Module):
    """Forward leaves its features in an attribute: capture must not leave its own values there."""

    features: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.features = None

    def forward(self, x: Tensor) -> Tensor:
        self.features = torch.relu(self.fc(x))
        return self.head(self.features)


class LazyTable(nn.Module):
    """A table of positions that the first call makes and later calls of the same length use again."""

    table: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.table = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or self.table.shape[0] != x.shape[1]:
            self.table = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None].cos()
        return self.head(torch.relu(self.fc(x + self.table)))


CASES = {
    "inplace_alias": ZooCase(InplaceAlias, normal(4, 8), sites=2),
    "inplace_slice": ZooCase(InplaceSlice, normal(4, 8), sites=2),
    "inplace_activation": ZooCase(InplaceActivation, normal(2, 3, 8, 8), sites=3),
    "inplace_unused_result": ZooCase(InplaceUnusedResult, normal(4, 8), sites=2),
    "discarded_batch_norm": ZooCase(DiscardedBatchNorm, normal(4, 8), sites=2),
    "running_counter": ZooCase(RunningCounter, normal(4, 8), sites=1),
    "augmented_counter": ZooCase(AugmentedCounter, normal(4, 8), sites=1),
    "running_mean": ZooCase(RunningMean, normal(4, 8), sites=2),
    "attribute_cache": ZooCase(AttributeCache, normal(4, 8), sites=2),
    "lazy_table": ZooCase(LazyTable, normal(2, 5, 8), sites=2),
}
