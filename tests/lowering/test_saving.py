"""Sparse files: what is in them, how large they are, into what they load, and what is refused."""

import copy
import json
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxsparse
from fxsparse.kernels import SparsePattern
from fxsparse.kernels.stored_pattern import check_rows, with_blocks
from fxsparse.lowering import LoweredModule
from fxsparse.lowering.sparse_file import SparseFileWriter
from fxsparse.runtime.lowered_site import Storage

from .runs import Net, Run, assert_same_state, masked


def trained(**options):
    run = Run(masked(**options)).to(5)
    return run.sparse


def images(dtype=torch.float64, count=3):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


# -- round trips ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["masked", "lowered"])
@pytest.mark.parametrize("written", ["masked", "lowered"])
@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.99])
def test_between_masked_and_lowered(written, read, sparsity, tmp_path, assert_same):
    source, target = trained(sparsity=sparsity), masked(seed=7, sparsity=0.5)
    expected = source.state_dict()
    for module, way in ((source, written), (target, read)):
        if way == "lowered":
            module.lower(train=True, layers="all")
    fxsparse.save_sparse(source, tmp_path / "s.safetensors")
    held = dict(target.named_parameters())
    assert fxsparse.load_sparse(target, tmp_path / "s.safetensors") is target
    assert_same(expected, target.state_dict())
    assert dict(target.named_parameters()).keys() == held.keys()
    assert all(parameter is held[name] for name, parameter in target.named_parameters())
    assert bool(target.lowered) == (read == "lowered")
    torch.testing.assert_close(target.eval()(images()), source.eval()(images()))


def test_inference_modules(tmp_path):
    one, other = trained().lower(layers="all"), masked(seed=7, sparsity=0.5).lower(layers="all")
    expected = one(images())
    assert not torch.allclose(other(images()), expected)
    fxsparse.save_sparse(one, tmp_path / "i.safetensors")
    assert fxsparse.load_sparse(other, tmp_path / "i.safetensors") is other
    assert torch.equal(other(images()), expected)
    assert {k: v.shape for k, v in one.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
    with pytest.raises(fxsparse.CheckpointError, match="was lowered for inference"):
        fxsparse.load_sparse(masked(), tmp_path / "i.safetensors")
    fxsparse.save_sparse(masked(), tmp_path / "m.safetensors")
    with pytest.raises(fxsparse.CheckpointError, match='lower="inference"'):
        fxsparse.load_sparse(other, tmp_path / "m.safetensors")


def in_blocks(monkeypatch, block):
    """Has modules that are lowered from now on store blocks, where their shapes allow."""
    made = lambda shape, _, calls: Storage(shape, block if shape[0] % 4 == 0 else 1, calls)  # noqa: E731
    monkeypatch.setattr("fxsparse.lowering.lowerable.Storage", made)


@pytest.mark.parametrize("read", [None, 1, 2, 4, "meta"])
@pytest.mark.parametrize("written", [1, 2, 4])
def test_blocks(written, read, tmp_path, monkeypatch, assert_same):
    """Rows that share a pattern; the file's blocks and the module's need not be the same."""
    source = masked(distribution="er")
    for mask in source.masks.values():
        if mask.shape[0] % 4 == 0:
            mask.copy_(mask[::4].repeat_interleave(4, 0))
    source.apply_masks_()
    expected = copy.deepcopy(source.state_dict())
    in_blocks(monkeypatch, written)
    source.lower(train=True, layers="all")
    fxsparse.save_sparse(source, tmp_path / "b")
    target = masked(seed=3, distribution="er")
    if read == "meta":
        with torch.device("meta"):
            model = Net().double()
        example = torch.randn(4, 3, 8, 8, device="meta").double()
        target = fxsparse.sparsify(model, example, sparsity=0.7, distribution="er")
        in_blocks(monkeypatch, 4)
        fxsparse.load_sparse(target, tmp_path / "b", "train", layers="all")
        assert target.lowered["down.weight"].block == 4
    else:
        for mask in target.masks.values():
            if mask.shape[0] % 4 == 0:
                mask.copy_(mask[::4].repeat_interleave(4, 0))
        if read is not None:
            in_blocks(monkeypatch, read)
            target.lower(train=True, layers="all")
        fxsparse.load_sparse(target, tmp_path / "b")
    assert_same(expected, target.state_dict())
    torch.testing.assert_close(target.eval()(images()), source.eval()(images()))


def test_single_weights_are_no_blocks(tmp_path, monkeypatch):
    fxsparse.save_sparse(masked(), tmp_path / "s")
    with torch.device("meta"):
        model = Net().double()
    target = fxsparse.sparsify(model, torch.randn(4, 3, 8, 8, device="meta").double(), sparsity=0.7)
    in_blocks(monkeypatch, 4)
    with pytest.raises(fxsparse.CheckpointError, match=r"the rows do not share positions in blocks of 4"):
        fxsparse.load_sparse(target, tmp_path / "s", "train", layers="all")
    assert all(parameter.is_meta for parameter in target.parameters()) and not target.lowered


def test_a_copy_of_a_tied_weight_is_kept_once(tmp_path, assert_same):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
            self.two.weight = self.one.weight
            self.norm = self.other = nn.LayerNorm(6)

        def forward(self, x):
            return self.other(self.two(self.norm(self.one(x))))

    def made(seed):
        torch.manual_seed(seed)
        return fxsparse.sparsify(Tied(), torch.randn(2, 6), sparsity=0.5, distribution="uniform", dense=(), seed=seed)

    source, target = made(0), made(1)
    fxsparse.save_sparse(source, tmp_path / "t.safetensors")
    fxsparse.load_sparse(target, tmp_path / "t.safetensors")
    assert_same(source.state_dict(), target.state_dict())
    assert target.two.weight is target.one.weight
    assert sum(name.endswith(("norm.weight", "other.weight")) for name in load_file(tmp_path / "t.safetensors")) == 1


def test_an_attached_optimizer_goes_on(tmp_path):
    """Loading moves its state to the new pattern, as loading a state_dict does."""
    runs = []
    source = Run(masked(seed=3)).to(7).sparse
    fxsparse.save_sparse(source, tmp_path / "s.safetensors")
    for load in (
        lambda m: m.load_state_dict(source.state_dict()),
        lambda m: fxsparse.load_sparse(m, tmp_path / "s.safetensors"),
    ):
        run = Run(masked(), "adamw", lower=0).to(4)
        before = run.optimizer.state_dict()
        load(run.sparse)
        after = run.optimizer.state_dict()
        assert any(
            not torch.equal(before["state"][k]["exp_avg"], after["state"][k]["exp_avg"]) for k in before["state"]
        )
        runs.append((after, run.to(8)))
    for key, state in runs[0][0]["state"].items():
        assert_same_state(state, runs[1][0]["state"][key], 0)
    assert runs[0][1].losses == runs[1][1].losses


# -- what is in it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["masked", "lowered", "inference"])
@pytest.mark.parametrize("sparsity, at_most", [(0.9, 0.2), (0.95, 0.1), (0.99, 0.04)])
def test_size(kind, sparsity, at_most, tmp_path):
    model = nn.Sequential(
        nn.Conv2d(64, 256, 3, bias=False), nn.ReLU(), nn.Conv2d(256, 128, 3), nn.Flatten(), nn.Linear(128 * 16, 100)
    )
    sparse = fxsparse.sparsify(model, torch.randn(1, 64, 8, 8), sparsity=sparsity, verify=False)
    module = sparse
    if kind == "lowered":
        module = copy.deepcopy(sparse).lower(train=True, layers="all")
    elif kind == "inference":
        module = sparse.lower(layers="all", verify=False)
    fxsparse.save_sparse(module, tmp_path / "sparse")
    torch.save(model.state_dict(), tmp_path / "dense")
    ratio = (tmp_path / "sparse").stat().st_size / (tmp_path / "dense").stat().st_size
    assert ratio <= at_most, ratio
    # values, and of each pattern a bit a position, or two bytes an active weight and a row; nothing else but a header
    counts = sparse.active_counts
    expected = 4 * (128 + 100)  # the biases
    for site in sparse.sites:
        count = counts[site.name]
        expected += 4 * count + min(-(-site.numel // 8), 2 * (count + site.shape[0]))
    assert expected < (tmp_path / "sparse").stat().st_size < expected + 2000


def test_the_format_by_hand(tmp_path):
    """Read without any of our code."""
    model = nn.Linear(4, 3)
    sparse = fxsparse.sparsify(model, torch.randn(1, 4), sparsity=0.5, distribution={"weight": 0.5})
    with torch.no_grad():
        sparse.weight.copy_(torch.arange(12.0).view(3, 4))
        sparse.masks["weight"].copy_(torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool())
    sparse.apply_masks_()
    fxsparse.save_sparse(sparse, tmp_path / "f")
    raw = (tmp_path / "f").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    begin, end = header["weight"]["data_offsets"]
    assert np.frombuffer(raw[8 + length :][begin:end], "<f4").tolist() == [1.0, 3.0, 8.0]
    begin, end = header["weight:bits"]["data_offsets"]
    assert list(raw[8 + length :][begin:end]) == [0b01010000, 0b10000000]
    assert json.loads(header["__metadata__"]["sites"]) == {"weight": {"shape": [3, 4], "block": 1, "pattern": "bits"}}
    assert set(header) == {"__metadata__", "weight", "weight:bits", "bias"}


@pytest.mark.parametrize("columns", [65_535, 65_536, 65_537])
@pytest.mark.parametrize("full", [False, True])
def test_narrow_columns_at_their_limits(columns, full, tmp_path):
    sparse = fxsparse.sparsify(
        nn.Linear(columns, 2), torch.randn(1, columns), sparsity=0.5, distribution={"weight": 0.999}, verify=False
    )
    mask = sparse.masks["weight"]
    mask.zero_()
    mask[0, [0, columns - 1]] = True
    mask[1] = full
    sparse.apply_masks_()
    expected = {key: value.clone() for key, value in sparse.state_dict().items()}
    fxsparse.save_sparse(sparse, tmp_path / "w")
    tensors = load_file(tmp_path / "w")
    if not full:
        assert tensors["weight:columns"].dtype == (torch.uint16 if columns <= 65_536 else torch.uint32)
        assert tensors["weight:counts"].dtype == (torch.uint16 if columns < 65_536 else torch.uint32)
    mask.fill_(True)
    fxsparse.load_sparse(sparse, tmp_path / "w")
    assert all(torch.equal(expected[key], value) for key, value in sparse.state_dict().items())


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_patterns_of_rows_are_those_of_masks(before, after):
    generator = torch.Generator().manual_seed(10 * before + after)
    for groups, shape in ((1, (8, 5, 3, 3)), (2, (16, 3, 1, 1)), (1, (8, 0)), (1, (0, 4)), (2, (8, 7))):
        rows = torch.rand(shape[0] // 4, *shape[1:], generator=generator) < 0.4
        mask = rows.repeat_interleave(4, 0)
        stored, expected = SparsePattern.of(mask, groups, before), SparsePattern.of(mask, groups, after)
        check_rows(shape, before, stored.starts, stored.columns)
        starts, columns = with_blocks((stored.starts, stored.columns), before, after)
        found = SparsePattern.of_rows(shape, groups, after, starts, columns)
        assert all(map(torch.equal, expected.tensors, found.tensors)), (groups, shape)
    with pytest.raises(fxsparse.InputError, match="do not share positions in blocks of 2"):
        with_blocks((torch.tensor([0, 1, 2]), torch.tensor([0, 1])), 1, 2)


def test_state_moves_between_patterns():
    generator = torch.Generator().manual_seed(0)
    for density in (0.0, 0.3, 1.0):
        one, other = (SparsePattern.of(torch.rand(6, 7, generator=generator) < d) for d in (density, 0.5))
        values = torch.randn(one.count, generator=generator)
        assert torch.equal(one.move(values, other), other.gather(one.scatter(values)))
        assert torch.equal(other.move(torch.ones(other.count), one), one.gather(other.scatter(torch.ones(other.count))))


# -- without the dense tensor -----------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest floating-point tensor with memory, and every dense one of given numbers of elements."""

    def __init__(self):
        super().__init__()
        self.floats, self.elements = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" and type(leaf) is torch.Tensor:
                elements = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.elements = max(self.elements, elements)
                if leaf.is_floating_point():
                    self.floats = max(self.floats, elements)
        return result


def two_layers(device):
    with torch.device(device):
        return nn.Sequential(nn.Conv2d(64, 256, 3), nn.BatchNorm2d(256), nn.ReLU(), nn.Conv2d(256, 128, 3))


@pytest.mark.parametrize("lower", ["train", "inference", "lowered", "lowered inference"])
@pytest.mark.parametrize("sparsity", [0.9, 0.99])
def test_never_dense(lower, sparsity, tmp_path):
    """Nothing with as many elements as a weight, whatever its dtype; of floats, nothing beyond the active ones."""
    goal = {"sparsity": sparsity, "distribution": "erk", "verify": False}
    x = torch.randn(1, 64, 6, 6)
    source = fxsparse.sparsify(two_layers("cpu"), x, **goal)
    if lower == "lowered inference":
        source = source.lower(layers="all")
    fxsparse.save_sparse(source, tmp_path / "big")
    device = "cpu" if lower.startswith("lowered") else "meta"
    target = fxsparse.sparsify(two_layers(device), x.to(device), seed=4, **goal)
    if lower == "lowered":
        target.lower(train=True, layers="all")
    elif lower == "lowered inference":
        target = target.lower(layers="all")
    smallest = 64 * 256 * 9
    most = max(source.active_counts.values()) if hasattr(source, "active_counts") else smallest // 5
    with Largest() as largest:
        if lower in ("train", "inference"):
            loaded = fxsparse.load_sparse(target, tmp_path / "big", lower, layers="all")
        else:
            loaded = fxsparse.load_sparse(target, tmp_path / "big")
    assert 0 < largest.floats <= most
    assert largest.elements < smallest
    if lower == "inference":
        assert isinstance(loaded, LoweredModule)
        assert all(parameter.is_meta for parameter in target.parameters())  # it can be loaded again
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    torch.testing.assert_close(loaded.eval()(x), source.eval()(x), rtol=1e-4, atol=1e-5)


PEAK = """
import sys
import torch
from torch import nn
import fxsparse
from fxsparse.kernels import kernels_in_use

kernels_in_use()
with torch.device("meta"):
    model = nn.Linear(8192, 8192)
sparse = fxsparse.sparsify(model, torch.randn(1, 8192, device="meta"), distribution={"weight": 0.95})


def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = peak()
loaded = fxsparse.load_sparse(sparse, sys.argv[1], sys.argv[2], layers="all")
assert loaded(torch.randn(1, 8192)).shape == (1, 8192)
print((peak() - before) * 1024 / 8192**2 / 4)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's account of peaks")
@pytest.mark.parametrize("lower", ["train", "inference"])
def test_peak_of_a_large_layer(lower, tmp_path):
    """256 MiB dense: loading it, mapped file and temporaries included, stays well below."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.rand(8192, 8192, generator=generator) < 0.05
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), columns.sum(1).cumsum(0)])
    at = columns.nonzero()[:, 1]
    writer = SparseFileWriter("module", "Linear")
    writer.add_site("weight", torch.randn(len(at)), (8192, 8192), starts, at)
    writer.add("bias", torch.zeros(8192))
    writer.write(tmp_path / "large")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "large"), lower]
    share = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0.1 < share < 0.6


@pytest.mark.parametrize("lower", [None, "train", "inference"])
def test_from_the_meta_device(lower, tmp_path, assert_same):
    source = trained()
    source.eval()
    fxsparse.save_sparse(source, tmp_path / "s")
    with torch.device("meta"):
        model = Net().double()
    goal = {"sparsity": 0.7, "distribution": "uniform", "update_interval": 3, "drop_fraction": 0.5}
    target = fxsparse.sparsify(model, torch.randn(4, 3, 8, 8, device="meta").double(), **goal)
    loaded = fxsparse.load_sparse(target, tmp_path / "s", lower, layers=["down*", "twice*"])
    torch.testing.assert_close(loaded.eval()(images()), source(images()))
    if lower == "inference":
        assert [decision.name for decision in loaded.decisions if decision.lowered] == ["twice.weight", "down.weight"]
        return
    assert loaded is target and set(target.lowered) == ({"down.weight", "twice.weight"} if lower else set())
    assert_same(source.state_dict(), target.state_dict())
    source._rewirer.detach()
    assert Run(target.train()).to(6).losses == pytest.approx(Run(source.train()).to(6).losses, rel=1e-9)


@pytest.mark.parametrize("lower", ["train", "inference"])
def test_into_a_masked_module_that_is_lowered_then(lower, tmp_path):
    source = trained()
    fxsparse.save_sparse(source, tmp_path / "s")
    loaded = fxsparse.load_sparse(masked(seed=5), tmp_path / "s", lower, layers="all")
    torch.testing.assert_close(loaded.eval()(images()), source.eval()(images()))


# -- a lowered module as a whole --------------------------------------------------------------------------


def test_lowered_modules_are_saved_as_a_whole(tmp_path):
    lowered = trained().lower(layers="all")
    expected = lowered(images())
    torch.save(lowered, tmp_path / "whole")
    loaded = torch.load(tmp_path / "whole", weights_only=False)
    for twin in (loaded, pickle.loads(pickle.dumps(lowered)), copy.deepcopy(lowered)):
        assert torch.equal(twin(images()), expected)
        assert twin.report() == lowered.report()
        with pytest.raises(fxsparse.InputError, match="lowered for inference"):
            twin.train()


def test_exported_programs(tmp_path):
    lowered = trained().lower(layers="all")
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(lowered, (images(),), dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for count in (1, 2, 7):
        assert torch.equal(loaded(images(count=count)), lowered(images(count=count)))


def test_a_spoiled_save_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    fxsparse.save_sparse(masked(), tmp_path / "s")
    before = (tmp_path / "s").read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fxsparse.lowering.sparse_file.save_file", full)
    with pytest.raises(fxsparse.CheckpointError, match=r"could not write .*: No space left on device"):
        fxsparse.save_sparse(masked(seed=3), tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]
