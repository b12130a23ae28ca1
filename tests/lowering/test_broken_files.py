"""Sparse files that are damaged, foreign, or of another model are refused in one line, and nothing changes."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fxsparse

from .runs import Net, masked


def rewritten(path, target, change):
    """The file with its tensors and metadata changed."""
    tensors = load_file(path)
    metadata = safe_open(path, framework="pt").__enter__().metadata()
    change(tensors, metadata)
    save_file(tensors, target, metadata)
    return target


def cut(raw):
    return raw[: len(raw) // 2]


BROKEN = {
    "truncated": (cut, "not a complete safetensors file"),
    "a few bytes": (lambda raw: raw[:5], "not a complete safetensors file"),
    "empty": (lambda raw: b"", "not a complete safetensors file"),
    "foreign": (lambda raw: b"PK" + raw, "not a complete safetensors file"),
}


def refused(module, path, match, **options):
    """In one line, and nothing has changed."""
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(fxsparse.FxSparseError, match=match) as caught:
        fxsparse.load_sparse(module, path, **options)
    assert "\n" not in str(caught.value)
    after = module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(case, tmp_path):
    change, match = BROKEN[case]
    fxsparse.save_sparse(masked(), tmp_path / "s")
    (tmp_path / "s").write_bytes(change((tmp_path / "s").read_bytes()))
    refused(masked(seed=1), tmp_path / "s", match)


def test_missing_file_and_unwritable_folder(tmp_path):
    refused(masked(), tmp_path / "none", "there is no file")
    refused(masked(), tmp_path, "not a complete safetensors file")
    with pytest.raises(fxsparse.CheckpointError, match="could not write") as caught:
        fxsparse.save_sparse(masked(), tmp_path / "no" / "folder")
    assert "\n" not in str(caught.value)
    fxsparse.save_sparse(masked(), tmp_path / "s")
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def _site(change):
    def changed(tensors, metadata):
        sites = json.loads(metadata["sites"])
        change(tensors, sites["down.weight"])
        metadata["sites"] = json.dumps(sites)

    return changed


def _put(name, index, value):
    def changed(tensors, metadata):
        other = tensors[name].long()
        other[index] = value
        tensors[name] = other.to(tensors[name].dtype)

    return changed


CHANGED = {
    "a dense file": (lambda t, m: m.clear(), "was not written by save_sparse"),
    "another version": (lambda t, m: m.update(fxsparse="99"), "has format 99; this version reads 1"),
    "no header": (lambda t, m: m.update(sites="{"), "a header that cannot be read"),
    "odd header": (lambda t, m: m.update(sites="[1]"), "a header that cannot be read"),
    "missing": (lambda t, m: t.pop("bn.bias"), "lacks bn.bias"),
    "unexpected": (lambda t, m: t.update(extra=torch.ones(2)), "has, unlike the module, extra"),
    "no pattern": (lambda t, m: t.pop("down.weight:columns"), "lacks down.weight:columns"),
    "other pattern": (_site(lambda t, s: s.update(pattern="odd")), "stored as 'odd'"),
    "a shape": (
        lambda t, m: t.update({"bn.bias": torch.ones(3).double()}),
        r"bn.bias with shape \(3,\), the module \(8,\)",
    ),
    "a site's shape": (_site(lambda t, s: s.update(shape=[16, 8, 9])), r"down.weight with shape \(16, 8, 9\)"),
    "a dtype": (lambda t, m: t.update({"bn.bias": t["bn.bias"].float()}), "bn.bias as torch.float32"),
    "a site's dtype": (lambda t, m: t.update({"down.weight": t["down.weight"].half()}), "down.weight as torch.float16"),
    "values": (lambda t, m: t.update({"down.weight": t["down.weight"][1:].clone()}), "damaged pattern: it has"),
    "a column beyond": (_put("down.weight:columns", 3, 72), "down.weight has a damaged pattern: .* in rows of 72"),
    "a wild column": (_put("down.weight:columns", 3, 65_535), "position 65535 in rows of 72"),
    "twice": (_put("down.weight:columns", slice(0, 2), 1), "do not ascend"),
    "counts": (_put("down.weight:counts", 0, 500), "do not add up"),
    "rows": (lambda t, m: t.update({"down.weight:counts": t["down.weight:counts"][:-1].clone()}), "damaged pattern"),
    "blocks": (_site(lambda t, s: s.update(block=3)), "damaged pattern"),
    "no blocks": (_site(lambda t, s: s.update(block=0)), "damaged pattern"),
    "bits": (
        lambda t, m: t.update({"fc.weight:bits": t["fc.weight:bits"][1:].clone()}),
        "fc.weight has a damaged pattern",
    ),
    "more bits": (_put("fc.weight:bits", 0, 255), "fc.weight has a damaged pattern: it has"),
    "an alias": (lambda t, m: m.update(aliases='{"bn.bias": "nowhere"}'), "lacks nowhere"),
}


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("case", CHANGED)
def test_changed_files(case, lowered, tmp_path):
    """Patterns are checked: the kernels would read wild memory."""
    change, match = CHANGED[case]
    source = masked(explicit={"down.weight": 0.97, "fc.weight": 0.5})
    fxsparse.save_sparse(source, tmp_path / "s")
    rewritten(tmp_path / "s", tmp_path / "changed", change)
    target = masked(seed=2, explicit={"down.weight": 0.9, "fc.weight": 0.5})
    if lowered:
        target.lower(train=True, layers="all")
    refused(target, tmp_path / "changed", match)


def test_other_models_and_kinds(tmp_path):
    fxsparse.save_sparse(masked(), tmp_path / "s")
    other = fxsparse.sparsify(nn.Linear(4, 4), torch.randn(1, 4))
    refused(other, tmp_path / "s", r"lacks bias and 1 more; it is of another model \(Net\)")
    excluded = masked(exclude=["down.weight"])
    refused(excluded, tmp_path / "s", "down.weight as a sparse weight, and it is not masked")
    fxsparse.save_sparse(excluded, tmp_path / "e")
    refused(masked(), tmp_path / "e", "down.weight as a dense tensor, and it is masked")
    refused(masked(), tmp_path / "s", "lower: 'gpu' is not one of: None, train, inference", lower="gpu")
    with pytest.raises(fxsparse.ConfigError, match="a Linear is not sparse"):
        fxsparse.save_sparse(nn.Linear(2, 2), tmp_path / "x")
    with pytest.raises(fxsparse.ConfigError, match="is for masked modules"):
        fxsparse.load_sparse(masked().lower(layers="all"), tmp_path / "s", "train")
    with torch.device("meta"):
        meta = fxsparse.sparsify(nn.Linear(4, 4), torch.randn(1, 4, device="meta"), verify=False)
    with pytest.raises(fxsparse.CheckpointError, match="weight is on the meta device; there is nothing to save"):
        fxsparse.save_sparse(meta, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_snfs_from_meta_is_refused_for_training(tmp_path):
    source = masked("snfs")
    fxsparse.save_sparse(source, tmp_path / "s")
    with torch.device("meta"):
        model = Net().double()
    target = fxsparse.sparsify(model, torch.randn(4, 3, 8, 8, device="meta").double(), "snfs", sparsity=0.7)
    with pytest.raises(fxsparse.RuntimeStateError, match="snfs reads the dense gradient"):
        fxsparse.load_sparse(target, tmp_path / "s", "train")
    assert all(parameter.is_meta for parameter in target.parameters())
