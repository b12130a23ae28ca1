"""Networks whose Python wants real tensors: `torch.export`, which runs forward on fake ones, takes them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import ZooCase, normal


class NoGradRegion(nn.Module):
    """A target computed under `no_grad`: without the region, gradients would flow."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(8, 4)
        self.teacher = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target = torch.softmax(self.teacher(x), dim=-1)
        out = self.student(x)
        return out, F.mse_loss(torch.softmax(out, dim=-1), target)


class AssignedBuffer(nn.Module):
    """A buffer that forward assigns anew, and reads before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(8))
        self.mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        before = self.fc(x * (1 + self.mean))
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return before * (x - self.mean).norm(dim=1, keepdim=True)


class Vmapped(nn.Module):
    """A function over rows by `torch.vmap`, which does not take the objects of a tracer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.vmap(lambda row: torch.tanh(row) * row.sum())(self.fc(x)))


CASES = {
    "no_grad_region": ZooCase(NoGradRegion, normal(4, 8), sites=2),
    "assigned_buffer": ZooCase(AssignedBuffer, normal(4, 8), sites=1),
    "vmapped": ZooCase(Vmapped, normal(4, 8), sites=2),
}
