"""The way of a device, on tensors of the CPU: the same numbers as on the host, and nothing read in an update step."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxsparse
from fxsparse import FxSparseWarning
from fxsparse.core import zeroing
from fxsparse.runtime import choose_patterns, selection
from fxsparse.runtime.shards import WHOLE

READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "nonzero_static", "masked_select", "unique", "equal", "item")


class RefuseReads(TorchDispatchMode):
    """Raises at an operation whose result the host, or a shape, depends on."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        by_mask = name in ("index", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in READS or by_mask:
            raise AssertionError(f"{func} reads a tensor")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_device(monkeypatch):
    """`as_device(True)`: tensors of the CPU are treated as those of a device."""

    def switch(on):
        for module in (selection, zeroing, choose_patterns):
            monkeypatch.setattr(module, "on_host", lambda tensor: not on)

    return switch


def train(method, refuse, poisoned=None, **options):
    """12 steps, every third an update step; that of number `poisoned` has a NaN in a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))
    sparse = fxsparse.sparsify(
        model, torch.randn(2, 3, 4, 4), method, sparsity=0.6, update_interval=3, stop_fraction=1.0, **options
    )
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    rewirer = sparse.attach(optimizer, total_steps=100)
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        optimizer.zero_grad()
        sparse(torch.randn(6, 3, 4, 4, generator=generator)).square().mean().backward()
        updates = rewirer.update_count
        if updates == poisoned and rewirer.is_update_step():
            sparse.get_parameter("4.weight").grad[3, 4] = float("nan")
        if refuse and rewirer.is_update_step():
            with RefuseReads():
                optimizer.step()
        else:
            optimizer.step()
    return sparse, optimizer, rewirer


CASES = {
    "rigl": {}, "set": {}, "static": {}, "pruning": {"begin": 2, "end": 9}, "snfs": {"redistribution": "none"},
    "rigl report": {"semantics": "report"}, "rigl rigl-tf": {"semantics": "rigl-tf"},
    "rigl forbidden": {"semantics": {"regrown": "forbidden"}}, "set first": {"semantics": {"weight_update": "first"}},
    "rigl blocks": {"granularity": (3, 1)},  # of 8 and 10 rows: the last of a column are smaller
}  # fmt: skip


def assert_same_run(assert_same, run, other):
    (sparse, optimizer, rewirer), (other_sparse, other_optimizer, other_rewirer) = run, other
    assert_same(dict(sparse.state_dict()), dict(other_sparse.state_dict()))
    assert_same(optimizer.state_dict(), other_optimizer.state_dict())
    assert sparse.active_counts == other_sparse.active_counts
    for one, two in zip(rewirer.history, other_rewirer.history, strict=True):
        norms, other_norms = one.grown_gradient_norm, two.grown_gradient_norm
        assert (one.step, one.changed, one.active, one.skipped) == (two.step, two.changed, two.active, two.skipped)
        assert norms == pytest.approx(other_norms, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_same_as_on_the_host_and_nothing_read(case, as_device, assert_same):
    on_host = train(case.split()[0], refuse=False, **CASES[case])
    as_device(True)
    on_device = train(case.split()[0], refuse=True, **CASES[case])
    as_device(False)
    assert_same_run(assert_same, on_host, on_device)
    assert case == "static" or any(sum(record.changed.values()) or case == "pruning" for record in on_device[2].history)


@pytest.mark.parametrize("case", ["rigl", "rigl report", "rigl rigl-tf", "snfs", "rigl blocks"])
def test_a_rewiring_that_turns_out_to_be_skipped(case, as_device, assert_same):
    with pytest.warns(FxSparseWarning, match="was skipped: a dense gradient was not finite"):
        on_host = train(case.split()[0], refuse=False, poisoned=1, **CASES[case])
    as_device(True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was skipped")
        on_device = train(case.split()[0], refuse=True, poisoned=1, **CASES[case])
    as_device(False)
    with pytest.warns(FxSparseWarning, match="was skipped: a dense gradient was not finite"):
        assert on_device[2].skipped_updates == 1
    assert [bool(record.skipped) for record in on_device[2].history][:3] == [False, True, False]
    assert_same_run(assert_same, on_host, on_device)


@pytest.mark.parametrize("method", ["rigl-sg", "snip"])
def test_what_depends_on_data_is_read(method, as_device):
    as_device(True)
    with pytest.raises(AssertionError, match="reads a tensor"):
        train(method, refuse=True)


@pytest.mark.parametrize("method", ["rigl-sg", "snip", "snfs"])
def test_methods_that_read_skip_at_once(method, as_device, assert_same):
    with pytest.warns(FxSparseWarning, match="was skipped"):
        on_host = train(method, refuse=False, poisoned=0)
    as_device(True)
    with pytest.warns(FxSparseWarning, match="was skipped"):
        on_device = train(method, refuse=False, poisoned=0)
    as_device(False)
    assert_same_run(assert_same, on_host, on_device)


def test_parts_without_elements_are_finite(as_device):
    """A rank may hold no row of a weight, or of any."""
    as_device(True)
    site = SimpleNamespace(shards=WHOLE)
    empty, one = torch.empty(0, 3), torch.ones(2)
    for tensors, finite in (
        ([empty], True),
        ([empty, one], True),
        ([one / 0, empty], False),
        ([one * math.nan], False),
    ):
        assert bool(choose_patterns._all_finite(tensors, site)) == finite
