"""Run by test_fsdp.py, once a rank: trains sharded modules and saves what each ends with.

python fsdp_worker.py FOLDER RANK WORLD
"""

import copy
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

import fxsparse

STEPS = 28
INTERVAL = 4
BATCH = 8  # of the joined batch
SPOILED = 8  # at this step, an update step, one output's gradient is infinite for the second half of the batch
FULL = StateDictOptions(full_state_dict=True)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


class Drifting(torch.optim.SGD):
    """Moves every weight in every step, inactive ones too."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter += 0.25


def drifting(parameters):
    return Drifting(parameters, lr=0.05, momentum=0.9)


# name -> method, options of sparsify, options of train
CASES = {
    "static": ("static", {}, {}),
    "set": ("set", {}, {}),
    "set by momentum": ("set", {"redistribution": "momentum"}, {}),
    "rigl": ("rigl", {}, {}),
    "rigl with AdamW": ("rigl", {}, {"optimizer": adamw}),
    "rigl by magnitude": ("rigl", {"semantics": {"gradient": "magnitude"}}, {}),
    "rigl, weights first": ("rigl", {"semantics": {"weight_update": "first"}}, {}),
    "rigl, zeroed": ("rigl", {"semantics": {"regrown": "zeroed"}}, {}),
    "rigl as its authors wrote it": ("rigl", {"semantics": "rigl-tf"}, {}),
    "rigl-sg": ("rigl-sg", {}, {}),
    "rigl-sm": ("rigl-sm", {}, {}),
    "pruning": ("pruning", {"method_options": {"begin": 4, "end": 20, "interval": 4}}, {}),
    "accumulated, synchronised once": ("rigl", {}, {"parts": 2}),
    "accumulated, synchronised always": ("rigl", {}, {"parts": 2, "synchronise": True}),
    "an infinite gradient on one rank": ("rigl", {}, {"spoil": True}),
    "evaluated in between": ("rigl", {}, {"evaluate": True}),
    "an optimizer that moves inactive weights": ("rigl", {}, {"optimizer": drifting}),
    "gathered again for the backward pass": (
        "rigl",
        {"semantics": {"gradient": "magnitude"}},
        {"reshard": True, "evaluate": True},
    ),
    "compiled": ("rigl", {}, {"compile": True}),
    "cut over replicas": ("rigl", {}, {"mesh": (1, 2)}),
    "replicas that are not cut": ("rigl", {}, {"mesh": (2, 1)}),
    "bfloat16": ("rigl", {}, {"policy": {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}}),
    "clipped": ("rigl", {}, {"clip": 0.5}),
}
EXACT = [case for case in CASES if case not in ("clipped", "bfloat16")]  # a norm is summed in another order


class Uneven(nn.Module):
    """Rows that two ranks cannot share evenly. Linear in each weight: with dyadic data, gradients are exact."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 5, bias=False, dtype=torch.float64)
        self.b = nn.Conv2d(2, 3, 3, bias=False, dtype=torch.float64)
        self.c = nn.Conv2d(2, 1, 3, dtype=torch.float64)  # nothing of it is left for the second rank

    def forward(self, x, factors):
        a = (self.a(x.flatten(1)[:, :16]) * factors).sum(1)
        return a + self.b(x).flatten(1).sum(1) + self.c(x).flatten(1).sum(1)


def example():
    return torch.zeros(2, 2, 8, 8, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.float64)


def sparse_module(method="rigl", seed=7, options=None, **more):
    torch.manual_seed(seed)
    options = dict(options or {})
    made = options.pop("method_options", None)
    if made is not None:
        method = fxsparse.runtime.methods.make_method(method, **made)
    return fxsparse.sparsify(
        *(Uneven(), example(), method), sparsity=0.6, update_interval=INTERVAL, verify=False, **options, **more
    )


def shard(sparse, mesh=(2,), policy=None, reshard=None):
    names = ("replicas", "shards")[-len(mesh) :]
    return fully_shard(
        sparse,
        mesh=init_device_mesh("cpu", mesh, mesh_dim_names=names),
        mp_policy=MixedPrecisionPolicy(**policy or {}),
        reshard_after_forward=reshard,
    )


class Run:
    """A run that can be left and gone on with."""

    def __init__(self, case, rank=0, world=1, seed=7):
        self.method, options, settings = CASES[case]
        self.parts, self.clip = settings.get("parts", 1), settings.get("clip")
        self.synchronise, self.spoil = settings.get("synchronise", False), settings.get("spoil", False)
        self.evaluate = settings.get("evaluate", False)
        self.rank, self.world = rank, world
        self.sparse = sparse_module(self.method, seed, options)
        if world > 1:
            shard(self.sparse, settings.get("mesh", (2,)), settings.get("policy"), settings.get("reshard"))
        self.optimizer = settings.get("optimizer", sgd)(self.sparse.parameters())
        if self.evaluate:
            self.look()
        self.rewirer = self.sparse.attach(self.optimizer, total_steps=STEPS)
        compiled = world > 1 and settings.get("compile", False)
        self.forward = torch.compile(self.sparse, backend="aot_eager") if compiled else self.sparse
        self.masks, self.norms = [], []

    def look(self):
        with torch.no_grad():
            self.sparse(*example())

    def backward(self, step, share, of):
        """One of the parts into which the joined batch falls."""
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(-4, 5, (BATCH, 2, 8, 8), generator=generator).double()
        factors = torch.randint(-4, 5, (BATCH, 5), generator=generator).double()
        if self.spoil and step == SPOILED:
            factors[-1, 4] = float("inf")  # only the last row's gradient, which the second rank holds
        rows = slice(share * BATCH // of, (share + 1) * BATCH // of)
        (self.forward(x[rows], factors[rows]).mean() * self.world / of).backward()

    def train(self, stop=STEPS):
        of = 2 * self.parts
        while self.rewirer.step_count < stop:
            step = self.rewirer.step_count
            self.optimizer.zero_grad()
            shares = range(self.rank * self.parts, (self.rank + 1) * self.parts) if self.world > 1 else range(of)
            for share in shares:
                if self.world > 1:
                    self.sparse.set_requires_gradient_sync(self.synchronise or share == shares[-1])
                self.backward(step, share, of)
            if self.evaluate:
                self.look()
            if self.clip:
                norm = nn.utils.clip_grad_norm_(self.sparse.parameters(), self.clip)
                self.norms.append(float(norm.full_tensor() if self.world > 1 else norm))
            self.optimizer.step()
            if step % INTERVAL == 0:
                self.masks.append({name: whole(mask).clone() for name, mask in self.sparse.masks.items()})
        return self

    def result(self):
        return {
            "module": get_model_state_dict(self.sparse, options=FULL),
            "optimizer": get_optimizer_state_dict(self.sparse, self.optimizer, options=FULL)["state"],
            "rewirer": self.rewirer.state_dict(),
            "telemetry": [vars(row) for row in self.rewirer.telemetry()],
            "report": self.sparse.report() + self.rewirer.report(),
            "masks": self.masks,
            "norms": self.norms,
            "held": {name: local(mask).numel() for name, mask in self.sparse.masks.items()},
            "stray": self.stray(),
        }

    def stray(self):
        """Numbers that are not 0 at this rank's inactive positions: of weights and the optimizer's state."""
        count = 0
        for name, mask in self.sparse.masks.items():
            weight = self.sparse.get_parameter(name)
            state = [value for value in self.optimizer.state[weight].values() if value.shape == weight.shape]
            count += sum(int(local(tensor)[~local(mask)].count_nonzero()) for tensor in [weight.detach(), *state])
        return count


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def resumed(rank, world, folder):
    """As "rigl", with everything written after 14 steps and read into a module that began otherwise."""
    before = Run("rigl", rank, world).train(14)
    dcp.save({"model": get_model_state_dict(before.sparse)}, checkpoint_id=f"{folder}/checkpoint")
    states = {
        "module": get_model_state_dict(before.sparse, options=FULL),
        "optimizer": get_optimizer_state_dict(before.sparse, before.optimizer, options=FULL),
        "rewirer": before.rewirer.state_dict(),
    }
    after = Run("rigl", rank, world, seed=8)
    model = get_model_state_dict(after.sparse)
    dcp.load({"model": model}, checkpoint_id=f"{folder}/checkpoint")
    set_model_state_dict(after.sparse, model)
    set_optimizer_state_dict(after.sparse, after.optimizer, copy.deepcopy(states["optimizer"]), options=FULL)
    after.rewirer.load_state_dict(before.rewirer.state_dict())
    after.masks = list(before.masks)
    return after.train().result(), states


def loaded_whole(state):
    """The state of a sharded module that began otherwise, after the whole state was loaded into it."""
    sparse = shard(sparse_module(seed=9))
    set_model_state_dict(sparse, dict(state), options=FULL)  # it puts parts in the place of what it is given
    return get_model_state_dict(sparse, options=FULL)


def from_meta(state):
    """The state of a module that was sharded without values, after the whole state was loaded into it."""
    with torch.device("meta"):
        sparse = fxsparse.sparsify(Uneven(), tuple(tensor.to("meta") for tensor in example()), verify=False)
    shard(sparse).to_empty(device="cpu")
    set_model_state_dict(sparse, dict(state), options=FULL)
    sparse.attach(sgd(sparse.parameters()), total_steps=STEPS)
    return get_model_state_dict(sparse, options=FULL)


def stray(rank):
    """The site that is found to have a weight where it is inactive, when only one rank's part has one."""
    run = Run("rigl", rank, 2)
    found = [run.rewirer._zeros.stray_weight()]
    if rank == 1:
        weight, mask = (local(run.sparse.get_parameter("b.weight")).detach(), local(run.sparse.masks["b.weight"]))
        weight[~mask] = 1.0
    return [*found, run.rewirer._zeros.stray_weight()]


def refusals():
    """What is raised where: name -> message."""
    tried = {}

    def attempt(name, act):
        try:
            act()
            tried[name] = "nothing was raised"
        except fxsparse.FxSparseError as error:
            tried[name] = f"{type(error).__name__}: {error}"

    def attach(sparse):
        return sparse.attach(sgd(sparse.parameters()), total_steps=STEPS)

    for method in ("snfs", "deepr", "dsr", "snip"):
        attempt(method, lambda method=method: attach(shard(sparse_module(method))))
    globally = {"method_options": {"scope": "global"}}
    attempt("pruning globally", lambda: attach(shard(sparse_module("pruning", options=globally))))
    attempt("blocks", lambda: attach(shard(sparse_module("rigl", granularity="2x1"))))
    inner = sparse_module()
    fully_shard(inner.a, mesh=init_device_mesh("cpu", (2,)))
    attempt("an inner module", lambda: attach(shard(inner)))
    mesh = init_device_mesh("cpu", (2,))
    other = fully_shard(sparse_module(), mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 else None)
    attempt("cut along columns", lambda: attach(other))
    partly = sparse_module()
    fully_shard(partly, mesh=mesh, ignored_params={partly.b.weight})
    attempt("ignored", lambda: attach(partly))
    parallel = sparse_module()
    parallelize_module(parallel, mesh, {"a": RowwiseParallel()})
    attempt("tensor parallel", lambda: attach(parallel))
    early = sparse_module()
    optimizer = sgd(early.parameters())
    attempt("an optimizer from before", lambda: shard(early).attach(optimizer, total_steps=STEPS))
    late = sparse_module()
    optimizer = sgd(late.parameters())
    late.attach(optimizer, total_steps=STEPS)
    shard(late)
    attempt("sharded after attach", lambda: optimizer.step())
    sparse = shard(sparse_module())
    attach(sparse)
    attempt("fold", sparse.fold)
    attempt("lower", sparse.lower)
    attempt("compact", sparse.compact)
    attempt("copy_to", lambda: sparse.copy_to(Uneven()))
    attempt("save_sparse", lambda: fxsparse.save_sparse(sparse, "nowhere.safetensors"))
    return tried


def main(folder, rank, world):
    torch.set_num_threads(1)
    limit = timedelta(seconds=120)  # a rank that waits for another one in vain is an error
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=limit)
    results = {case: Run(case, rank, world).train().result() for case in CASES}
    results["resumed"], results["midway"] = resumed(rank, world, folder)
    results["loaded whole"] = loaded_whole(results["rigl"]["module"])
    results["from meta"] = from_meta(results["rigl"]["module"])
    results["stray"] = stray(rank)
    results["refusals"] = refusals()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()), int(sys.argv[2]), int(sys.argv[3]))
