"""Rewiring on a CUDA device: without a host synchronisation, the same masks as on the CPU, the same on every run."""

import warnings

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import FxSparseWarning

pytestmark = pytest.mark.gpu

CASES = {
    "rigl": {}, "set": {}, "pruning": {"begin": 2, "end": 9}, "snfs": {"redistribution": "none"},
    "rigl report": {"semantics": "report"}, "rigl rigl-tf": {"semantics": "rigl-tf"},
    "rigl forbidden": {"semantics": {"regrown": "forbidden"}}, "set first": {"semantics": {"weight_update": "first"}},
    "rigl blocks": {"granularity": (3, 1)},
}  # fmt: skip


class Run:
    """A network whose gradients are whole numbers, drawn by a seed: the same on every device, and full of ties."""

    def __init__(self, case, device, layout=torch.contiguous_format):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.ReLU(), nn.Conv2d(64, 40, 3), nn.Flatten(), nn.Linear(640, 100))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randint(-9, 10, parameter.shape) / 8)
        x = torch.randn(2, 16, 8, 8)
        self.sparse = fxsparse.sparsify(
            model, x, case.split()[0], sparsity=0.8, update_interval=3, stop_fraction=1.0, **CASES.get(case, {})
        )
        self.sparse.to(device=device, memory_format=layout)
        self.optimizer = torch.optim.SGD(self.sparse.parameters(), lr=0.125, momentum=0.5)
        self.rewirer = self.sparse.attach(self.optimizer, total_steps=100)
        self.generator = torch.Generator().manual_seed(1)

    def set_gradients(self):
        need = self.rewirer.method.dense_gradient.value
        dense = need == "at every step" or (need == "on update steps" and self.rewirer.is_update_step())
        masks = self.sparse.masks
        for name, parameter in self.sparse.named_parameters():
            drawn = (torch.randint(-9, 10, parameter.shape, generator=self.generator) / 8).to(parameter)
            parameter.grad = drawn if dense or name not in masks else drawn * masks[name]

    def steps(self, count, mode="default"):
        """`mode`: what CUDA is to do about synchronisations in update steps."""
        for _ in range(count):
            self.set_gradients()
            update = self.rewirer.is_update_step()
            try:
                if update:
                    torch.cuda.set_sync_debug_mode(mode)
                self.optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return self


def assert_same_run(run, other):
    for (name, tensor), own in zip(run.sparse.state_dict().items(), other.sparse.state_dict().values(), strict=True):
        assert torch.equal(tensor.cpu(), own.cpu()), name
    for record, own in zip(run.rewirer.history, other.rewirer.history, strict=True):
        assert (record.step, record.changed, record.active, record.skipped) == (
            own.step, own.changed, own.active, own.skipped,
        )  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES)
def test_no_synchronisation_and_the_masks_of_the_cpu(case, layout):
    on_device = Run(case, "cuda", layout).steps(14, mode="error")
    assert_same_run(on_device, Run(case, "cpu").steps(14))
    assert_same_run(on_device, Run(case, "cuda", layout).steps(14))
    assert on_device.rewirer.update_count >= 3


def test_a_synchronisation_would_be_seen():
    with pytest.raises(RuntimeError, match="synchroniz"):
        Run("dsr", "cuda").steps(8, mode="error")


@pytest.mark.parametrize(("method", "most"), [("dsr", 1), ("rigl-sg", 2), ("snfs", 2), ("snip", 1)])
def test_what_depends_on_data_is_read_for_all_sites_together(method, most):
    """Three layers, and no more than one synchronisation for the numbers and one for whether gradients are finite."""
    run = Run(method, "cuda")
    run.steps(0 if method == "snip" else 3)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run.steps(1, mode="warn")
    assert 1 <= sum("synchroniz" in str(warning.message) for warning in seen) <= most


def test_a_gradient_that_is_not_finite_is_found_by_the_device():
    run = Run("rigl", "cuda").steps(3)
    before = {name: mask.clone() for name, mask in run.sparse.masks.items()}
    weights = {name: run.sparse.get_parameter(name).clone() for name in before}
    run.set_gradients()
    run.sparse.get_parameter("4.weight").grad[3, 4] = float("nan")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, mask in run.sparse.masks.items():
        assert torch.equal(mask, before[name])
        assert torch.equal(run.sparse.get_parameter(name), weights[name])
    with pytest.warns(FxSparseWarning, match="step 3 was skipped: a dense gradient was not finite"):
        assert run.rewirer.skipped_updates == 1
