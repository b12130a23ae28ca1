"""RigL on models of every kind: twenty steps with one rewiring, the loss falls and the masks keep their promises."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fxsparse

ROOT = Path(__file__).parents[2]
STEPS, INTERVAL = 20, 10

pytest.importorskip("timm")
pytest.importorskip("transformers")

QUICK = [("timm", "test"), ("transformers", "llama"), ("zoo", "data_loop")]
SLOW = [
    ("torchvision", "resnet18"),
    ("torchvision", "ssdlite320_mobilenet_v3_large"),
    ("timm", "mobilevit"),
    ("transformers", "bert"),
    ("transformers", "t5"),
    ("transformers", "whisper"),
    ("zoo", "called_twice"),
]


@pytest.fixture
def sets(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import survey.sets

    yield survey.sets
    sys.modules.pop("survey.sets")


@pytest.mark.parametrize(("which", "name"), [*QUICK, *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW)])
def test_twenty_steps_with_one_rewiring(sets, which, name):
    model, example = sets.build(which, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxsparse.FxSparseWarning)
        sparse = fxsparse.sparsify(model, example, sparsity=0.7, update_interval=INTERVAL, verify=False)
    sparse.train()
    optimizer = torch.optim.Adam(sparse.parameters(), lr=1e-2 if which == "zoo" else 3e-3)
    rewirer = sparse.attach(optimizer, total_steps=STEPS)
    masks, counts = dict(sparse.masks), sparse.active_counts
    before = {name: mask.clone() for name, mask in masks.items()}
    losses = []
    for step in range(STEPS):
        torch.manual_seed(7)  # the same dropout and the same sampling of boxes at every step
        loss = loss_of(output_of(sparse, example))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        check(sparse, optimizer)
        moved = any(not torch.equal(before[name], mask) for name, mask in sparse.masks.items())
        assert moved == (step >= INTERVAL)
    assert sum(losses[-3:]) < 0.98 * sum(losses[:3])
    assert rewirer.step_count == STEPS and len(rewirer.history) >= 1
    assert sparse.active_counts == counts
    assert all(sparse.masks[name] is mask for name, mask in masks.items())


def check(sparse, optimizer):
    """Inactive weights are 0 in storage, without momentum, and have no gradient between rewirings."""
    for name, mask in sparse.masks.items():
        weight = sparse.get_parameter(name)
        assert not weight.detach()[~mask].any()
        for value in optimizer.state[weight].values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                assert not value[~mask].any()


def output_of(model, example):
    if isinstance(example, tuple):
        return model(*example)
    return model(**example) if isinstance(example, dict) else model(example)


def loss_of(output):
    """A detector's own losses; otherwise the distance of the first tensor from a fixed random target."""
    if isinstance(output, dict) and output and all(value.ndim == 0 for value in output.values() if value is not None):
        return sum(output.values())
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if hasattr(output, "values") else output))
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    return F.mse_loss(output, target)
