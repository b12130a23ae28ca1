"""The contenders: a training step of each, in the two parts that are timed apart. They run in worker processes."""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Case = dict[str, Any]


def network(case: Case) -> nn.Module:
    """The dense network, the same in every process."""
    import fxsparse.models as models

    torch.manual_seed(0)
    options = {"image_size": case["size"]} if case["network"].startswith("vit") else {}
    model = models.build(case["network"], case["classes"], **options)
    layout = torch.channels_last if case["format"] == "channels_last" else torch.contiguous_format
    return model.to(case["device"], memory_format=layout)


def batch(case: Case) -> tuple[Tensor, Tensor]:
    """Pictures and labels, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case["batch"], 3, case["size"], case["size"], generator=generator)
    y = torch.randint(case["classes"], (case["batch"],), generator=generator)
    layout = torch.channels_last if case["format"] == "channels_last" else torch.contiguous_format
    return x.to(case["device"]).contiguous(memory_format=layout), y.to(case["device"])


class Trainer:
    """Dense training: SGD with momentum and weight decay on one batch.

    A step is `forward_backward`, `move_weights`, `rewire_if_due`. Of a contender that rewires *instead of* moving the
    weights, as the paper has it, `move_weights` does nothing and the other does both.

    Attributes:
        roots: what holds the run's tensors; the losses of all steps are apart.
        rewirings: how often the masks were changed.
    """

    sparse = False
    rewirings = 0

    def __init__(self, case: Case) -> None:
        self.case = case
        self.x, self.y = batch(case)
        self.model = self.make()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=case["lr"], momentum=0.9, weight_decay=1e-4, fused=True
        )
        self.losses: list[Tensor] = []
        self.graphs = case.get("compile") == "reduce-overhead"
        self.run: Any = self.model
        if case.get("compile"):
            # as it is by default, dynamo goes on in eager mode past its limit of recompilations
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            self.run = torch.compile(self.model, mode=case["compile"], fullgraph=True)
        dtype = {"fp32": None, "bf16": torch.bfloat16}[case["precision"]]
        device = torch.device(case["device"]).type
        self.autocast = (lambda: torch.autocast(device, dtype=dtype)) if dtype is not None else contextlib.nullcontext
        self.roots: list[Any] = [self.model, self.optimizer, self.x, self.y]
        self.prepare()

    def make(self) -> nn.Module:
        return network(self.case)

    def prepare(self) -> None:
        """What comes after the optimizer is there."""

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def forward_backward(self) -> None:
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        self.zero_grad()
        with self.autocast():
            loss = F.cross_entropy(self.run(self.x), self.y)
        loss.backward()
        self.losses.append(loss.detach().clone())  # a CUDA graph writes the next one into the same memory

    def move_weights(self) -> None:
        self.optimizer.step()

    def rewire_if_due(self) -> None:
        pass

    def step(self) -> None:
        self.forward_backward()
        self.move_weights()
        self.rewire_if_due()

    def masked(self) -> list[tuple[Tensor, Tensor, int]]:
        """Of each masked weight: the weight as its layer sees it, the mask, and the number of active ones it got."""
        return []


class Fxsparse(Trainer):
    """fxsparse, RigL, ERK."""

    sparse = True

    def make(self) -> nn.Module:
        import fxsparse

        return fxsparse.sparsify(
            network(self.case),
            self.x,
            "rigl",
            sparsity=self.case["sparsity"],
            distribution="erk",
            update_interval=self.case["interval"],
            stop_fraction=1.0,
            verify=False,
        )

    def prepare(self) -> None:
        self.rewirer = self.model.attach(self.optimizer, total_steps=LONG)
        self.roots.append(self.rewirer)

    def move_weights(self) -> None:
        pass

    def rewire_if_due(self) -> None:
        self.optimizer.step()
        self.rewirings = self.rewirer.update_count - self.rewirer.skipped_updates

    def masked(self) -> list[tuple[Tensor, Tensor, int]]:
        from fxsparse.core.masking import floor_count

        found = []
        for name, mask in self.model.masks.items():
            weight = self.model.get_parameter(name).detach()
            found.append((weight, mask, mask.numel() - floor_count(self.model.target_sparsities[name], mask.numel())))
        return found


LONG = 10**7
"""Steps of the run that schedules are told of: the drop fraction stays what it is at the start."""


class RiglTorch(Trainer):
    """rigl-torch, used as its documentation has it; it knows the uniform distribution alone."""

    sparse = True

    def prepare(self) -> None:
        from rigl_torch.RigL import RigLScheduler

        self.pruner = RigLScheduler(
            self.model,
            self.optimizer,
            dense_allocation=1 - self.case["sparsity"],
            T_end=LONG,
            delta=self.case["interval"],
            alpha=0.3,
            ignore_linear_layers=False,
            sparsity_distribution="uniform",
        )
        self.roots.append(self.pruner)

    def move_weights(self) -> None:
        pass

    def rewire_if_due(self) -> None:
        if self.pruner():
            self.optimizer.step()
        self.rewirings = self.pruner.rigl_steps

    def masked(self) -> list[tuple[Tensor, Tensor, int]]:
        together = zip(self.pruner.W, self.pruner.backward_masks, self.pruner.S, strict=True)
        return [(w.detach(), m, w.numel() - int(s * w.numel())) for w, m, s in together if m is not None]


class Sparsimony(Trainer):
    """sparsimony's RigL, ERK; every conv and linear (an attention's joint input weight has no module of its own).

    It refuses weights in channels_last, so only the pictures are.
    """

    sparse = True

    def make(self) -> nn.Module:
        return network(self.case).to(memory_format=torch.contiguous_format)

    def prepare(self) -> None:
        from sparsimony.distributions.base import ERKDistribution
        from sparsimony.dst.rigl import RigL
        from sparsimony.schedulers.base import CosineDecayScheduler

        scheduler = CosineDecayScheduler(0.3, t_end=LONG, delta_t=self.case["interval"])
        self.sparsifier = RigL(
            scheduler,
            ERKDistribution(),
            self.optimizer,
            sparsity=self.case["sparsity"],
            init_method=None,
        )
        kinds = (nn.Conv2d, nn.Linear)
        names = [name for name, module in self.model.named_modules() if isinstance(module, kinds)]
        self.sparsifier.prepare(self.model, [{"tensor_fqn": f"{name}.weight"} for name in names])
        self.roots.append(self.sparsifier)

    def rewire_if_due(self) -> None:
        self.rewirings += bool(self.sparsifier.step())

    @torch.no_grad()
    def masked(self) -> list[tuple[Tensor, Tensor, int]]:
        found = []
        for config in self.sparsifier.groups:
            mask = config["module"].parametrizations.weight[0].mask
            count = int(mask.numel() * (1 - config["sparsity"])) if config["sparsity"] else mask.numel()
            found.append((config["module"].weight.detach(), mask.bool(), count))
        return found


TRAINERS = {"dense": Trainer, "fxsparse": Fxsparse, "rigl-torch": RiglTorch, "sparsimony": Sparsimony}
