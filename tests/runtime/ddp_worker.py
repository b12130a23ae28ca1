"""Run by test_ddp.py, once a rank: trains every method on two networks and saves what each ends with.

python ddp_worker.py FOLDER RANK WORLD
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxsparse

STEPS = 36
BATCH = 8  # of the joined batch
METHODS = {
    "static": ("static", {}),
    "set": ("set", {}),
    "set by momentum": ("set", {"redistribution": "momentum"}),
    "rigl": ("rigl", {}),
    "rigl by magnitude": ("rigl", {"semantics": {"gradient": "magnitude"}}),
    "rigl, weights first": ("rigl", {"semantics": {"weight_update": "first"}}),
    "rigl-sg": ("rigl-sg", {}),
    "rigl-sm": ("rigl-sm", {}),
    "snfs": ("snfs", {}),
    "snfs by the optimizer": ("snfs", {"momentum": "optimizer"}),
    "dsr": ("dsr", {"threshold": 0.05}),
    "deepr": ("deepr", {"noise": 0.5, "l1": 0.1}),
    "pruning": ("pruning", {}),
    "pruning globally": ("pruning", {"scope": "global"}),
    "snip": ("snip", {"batches": 3}),
    "rigl-struct": ("rigl-struct", {"drop_fraction": 0.6}),
    "set on channels": ("set", {"granularity": "channel", "drop_fraction": 0.6}),
}
ON_CHANNELS = ("rigl-struct", "set on channels")


class Linears(nn.Module):
    """Linear in its weights, so that with dyadic data every gradient is exact in float64, in any order."""

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
        return self.head(self.features(x).flatten(1)).tanh().mean(1)


NETS = {"linears": Linears, "convolutional": Convolutional}
CASES = [(case, net) for case in METHODS for net in NETS if net != "linears" or case not in ON_CHANNELS]


def train(case: str, net: str, rank: int = 0, world: int = 1) -> dict:
    """What a rank ends with; one process alone goes through the halves of the joined batch one after the other."""
    method, options = METHODS[case]
    torch.manual_seed(7)
    model = NETS[net]()
    dtype = next(model.parameters()).dtype
    sparse = fxsparse.sparsify(
        model, torch.zeros(2, 2, 8, 8, dtype=dtype), method, sparsity=0.75, update_interval=4, verify=False, **options
    )
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    rewirer = sparse.attach(optimizer, total_steps=STEPS)
    # Were the masks broadcast, a rank that disagrees would be put right before anybody could see it.
    parallel = DistributedDataParallel(sparse, broadcast_buffers=net != "linears") if world > 1 else sparse
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        joined = torch.randint(-4, 5, (BATCH, 2, 8, 8), generator=generator).to(dtype)
        factors = torch.randint(-4, 5, (BATCH,), generator=generator).to(dtype)
        optimizer.zero_grad()
        for part in [rank] if world > 1 else range(2):
            rows = slice(part * BATCH // 2, (part + 1) * BATCH // 2)
            loss = (parallel(joined[rows]) * factors[rows]).mean() * world / 2
            loss.backward()
        optimizer.step()
    state = {key: value for key, value in sparse.state_dict().items() if "running" not in key and "num_b" not in key}
    return {"module": state, "rewirer": rewirer.state_dict(), "optimizer": optimizer.state_dict()}


def main(folder: str, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save({(case, net): train(case, net, rank, world) for case, net in CASES}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()), int(sys.argv[2]), int(sys.argv[3]))
