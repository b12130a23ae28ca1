"""A small network and a training loop: masked and lowered twins are compared by what it gives."""

import torch
from torch import nn

import fxsparse

STEPS = 13
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.003, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.003, amsgrad=True),
}


class Net(nn.Module):
    """A convolution that is used twice, a strided, a grouped and a one-dimensional one, norms, linears."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.bn2 = nn.BatchNorm2d(16)
        self.along = nn.Conv1d(16, 12, 3)
        self.fc = nn.Linear(12, 10)

    def forward(self, x):
        x = torch.relu(self.bn(self.first(x)))
        x = x + self.twice(torch.relu(self.twice(x)))
        x = torch.relu(self.bn2(self.grouped(self.down(x))))
        x = torch.tanh(self.along(x.flatten(2)))
        return self.fc(x.transpose(1, 2)).mean(1)


def masked(method="rigl", dtype=torch.float64, seed=0, model=None, **options):
    torch.manual_seed(seed)
    example = torch.randn(4, 3, 8, 8, dtype=dtype)
    goal = {"sparsity": 0.7, "distribution": "uniform", "update_interval": 3, "drop_fraction": 0.5, "verify": False}
    return fxsparse.sparsify((model or Net()).to(dtype), example, method, **(goal | options))


class Run:
    """A module, its optimizer and its rewirer, stepped on batches that are numbered."""

    def __init__(self, sparse, optimizer="sgd", lower=None, forward=None, **attach):
        """`lower` is the step before which the weights are lowered, 0 before the optimizer is made; None for never."""
        self.sparse, self.lower_at = sparse, lower
        if lower == 0:
            sparse.lower(train=True, layers="all")
        self.optimizer = OPTIMIZERS[optimizer](sparse.parameters())
        self.rewirer = sparse.attach(self.optimizer, STEPS + 4, **attach)
        self.forward = forward(sparse) if forward else sparse
        self.losses, self.masks, self.step = [], [], 0

    def backward(self, batch, scale=1.0):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)
        x = x.to(next(self.sparse.parameters()).dtype)
        loss = (self.forward(x) - 0.5).square().mean() * scale
        loss.backward()
        return loss.item()

    def to(self, stop, accumulate=1, clip=None, set_to_none=True, discard=False, each=lambda step: None):
        while self.step < stop:
            if self.step == self.lower_at and self.step:
                self.sparse.lower(train=True, layers="all")
            self.optimizer.zero_grad(set_to_none)
            if discard:
                self.backward(1000 + self.step)
                self.optimizer.zero_grad(set_to_none)
            batches = range(self.step * accumulate, (self.step + 1) * accumulate)
            self.losses += [self.backward(batch, 1 / accumulate) for batch in batches]
            if clip:
                nn.utils.clip_grad_norm_(self.sparse.parameters(), clip)
            each(self.step)
            self.optimizer.step()
            self.masks.append({name: mask.clone() for name, mask in self.sparse.masks.items()})
            self.step += 1
        return self


def assert_same_run(expected, found, rel=1e-9):
    """Losses, masks after every step, records, and in the end weights and the optimizer's state."""
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(expected.losses), rtol=rel, atol=rel)
    for step, (one, other) in enumerate(zip(expected.masks, found.masks, strict=True)):
        for name in one:
            assert torch.equal(one[name], other[name]), (step, name)
    assert [(r.step, r.changed, r.skipped) for r in expected.rewirer.history] == [
        (r.step, r.changed, r.skipped) for r in found.rewirer.history
    ]
    assert_same_state(expected.sparse.state_dict(), found.sparse.state_dict(), rel)


def assert_same_state(expected, found, rel=1e-9):
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=rel, atol=rel, msg=lambda text, key=key: f"{key}: {text}")
