"""Run by test_ddp.py under torchrun: trains one rank and saves what it ends with.

torchrun --nproc-per-node=2 ddp_worker.py OUT METHOD NET
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxsparse

STEPS = 300
BATCH = 8  # of the joined batch


class Linears(nn.Module):
    """Linear in its weights, so that with dyadic data every sum is exact in float64, whatever its order."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 8, bias=False, dtype=torch.float64)
        self.b = nn.Conv2d(2, 4, 3, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.a(x.flatten(1)[:, :16]).sum(1) + self.b(x).flatten(1).sum(1)


class Convolutional(nn.Module):
    """An ordinary small network with normalisation."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.head = nn.Linear(8 * 4 * 4, 3)

    def forward(self, x):
        return self.head(self.features(x).flatten(1)).square().mean(1)


def main(out: str, method: str, net: str) -> None:
    torch.set_num_threads(1)
    rank, world = 0, 1
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(7)
    model = {"linears": Linears, "convolutional": Convolutional}[net]()
    dtype = next(model.parameters()).dtype
    if net == "linears":
        for parameter in model.parameters():
            parameter.data = torch.randint(-64, 65, parameter.shape).to(dtype)
    sparse = fxsparse.sparsify(model, torch.zeros(2, 2, 8, 8, dtype=dtype), method, sparsity=0.75, update_interval=10)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.25 if net == "linears" else 0.05)
    rewirer = sparse.attach(optimizer, total_steps=STEPS)
    parallel = DistributedDataParallel(sparse) if world > 1 else sparse
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        joined = torch.randint(-4, 5, (BATCH, 2, 8, 8), generator=generator).to(dtype)
        factors = torch.randint(-4, 5, (BATCH,), generator=generator).to(dtype)
        rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        optimizer.zero_grad()
        (parallel(joined[rows]) * factors[rows]).mean().backward()
        optimizer.step()
    changed = sum(sum(record.changed.values()) for record in rewirer.history)
    torch.save(
        {"state": sparse.state_dict(), "changed": changed, "updates": len(rewirer.history)}, Path(out) / f"{rank}.pt"
    )
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
