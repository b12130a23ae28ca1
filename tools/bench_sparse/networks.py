"""Dense, masked and lowered networks of a case, each with the masked eager model that it is checked against."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
import fxsparse.models as models

Case = dict[str, Any]


def dense_network(case: Case) -> tuple[nn.Module, Tensor]:
    """The network with statistics as after training, and its input; the same at every call and in every process."""
    torch.manual_seed(0)
    given = {} if case["classes"] is None else {"num_classes": case["classes"]}
    if case.get("variant") == "nn.GRU":
        given["unrolled"] = False
    model = models.build(case["network"], **given)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            # a block's last one is small, as its 0 at first is in training: else rounding grows from block to block
            nn.init.uniform_(module.weight, *((0.1, 0.3) if name.endswith("bn3") else (0.5, 1.5)))
            nn.init.normal_(module.bias, std=0.1)
    calibrate(model, case)
    return model, models.example_input(case["network"], case["batch"], case["size"])


def calibrate(model: nn.Module, case: Case) -> None:
    """Running statistics of a batch, so that activations keep their size through a deep or thin network.

    It is not the example's batch: a training step on that one is to move them.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    like = models.example_input(case["network"], max(4, case["batch"]), case["size"])
    with torch.no_grad():
        model.train()(torch.randn(like.shape, generator=torch.Generator().manual_seed(2)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def sparse_network(case: Case) -> tuple[fxsparse.SparseModule, nn.Module, Tensor]:
    """The masked module, the user's own model with the same masked weights, and the input."""
    model, x = dense_network(case)
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in case["options"].items()}
    sparse = fxsparse.sparsify(model, x, sparsity=case["sparsity"], verify=False, **options, **case.get("more", {}))
    sparse.copy_to(model)
    calibrate(model, case)
    sparse.load_state_dict(model.state_dict(), strict=False)
    return sparse, model, x


def first_output(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else first_output(output[0])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; infinite where anything is not finite."""
    found, expected = found.detach().double(), expected.detach().double()
    if found.shape != expected.shape or not (found.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


class Training:
    """Training steps of a network: SGD with momentum on one batch."""

    def __init__(self, model: nn.Module, x: Tensor, labels: Tensor, lr: float = 1e-3, decay: float = 5e-4) -> None:
        self.model, self.x, self.labels = model, x, labels
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=decay, fused=True)

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(first_output(self.model(self.x)), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def labels_for(case: Case) -> Tensor:
    return torch.randint(case["classes"], (case["batch"],), generator=torch.Generator().manual_seed(1))


CHECK_LR = 0.1
"""Large enough that one step's change of a weight stands out of the weight's own rounding."""


def norm_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the expected norm; infinite where anything is not finite."""
    found, expected = found.detach().double(), expected.detach().double()
    if found.shape != expected.shape or not (found.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def step_error(state: nn.Module, trained: nn.Module, reference: nn.Module, x: Tensor, labels: Tensor) -> float:
    """One step of `trained` beside one of the eager `reference`: error of the worst tensor's change, in norms.

    `state` speaks the reference's keys (it is `trained`, or what `trained` was compiled from). Masked positions do
    not count; the reference moves them too. Norms, since another order of summation turns a few ReLUs at 0, and with
    them whole images' shares of single entries.
    """
    before = {key: value.clone() for key, value in reference.state_dict().items()}
    masks = {key.removesuffix("_mask"): value.clone() for key, value in state.state_dict().items() if "_mask" in key}
    losses = []
    for net, given in ((trained, x), (reference, x.contiguous())):
        losses.append(Training(net.train(), given, labels, lr=CHECK_LR, decay=0.0).step())
    after, expected = state.state_dict(), reference.state_dict()
    worst = relative_error(*losses)
    for key, old in before.items():
        if old.is_floating_point():
            keep = masks.get(key, torch.ones((), dtype=torch.bool))
            change, right = (after[key] - old) * keep, (expected[key] - old) * keep
            worst = max(worst, norm_error(change, right))
    return worst
