"""The command: every format, and one line for everything that can be wrong."""

import csv
import io
import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from torch import nn

import fxsparse
import fxsparse.models as models
from fxsparse.cli import main

NET = ("wide_resnet22_2", "--sparsity", "0.9")


def run(capsys, *argv):
    """Exit code, standard output and standard error."""
    code = main(["flops", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_script_is_the_command():
    script = Path(__file__).parents[2] / "tools" / "flopcount.py"
    done = subprocess.run(
        [sys.executable, script, "small_resnet", "--input", "1,1,8,8"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("MACs of one forward pass of the example, FLOPs are 2 x MACs")


def test_table_groups_by_module_to_a_depth(capsys):
    _, every, _ = run(capsys, *NET)
    _, first, _ = run(capsys, *NET, "--depth", "1")
    _, whole, _ = run(capsys, *NET, "--depth", "0")
    names = lambda text: [line.split()[0] for line in text.split("\n\n")[1].splitlines()[2:]]  # noqa: E731
    assert names(first) == ["conv1", "stage1", "stage2", "stage3", "fc", "total"]
    assert len(names(every)) == 24 and names(every)[1] == "stage1.0.shortcut"
    assert "(the whole model)" in whole
    for text in (every, first, whole):
        assert "157,730,048 MACs dense, 27,379,136 sparse" in text and "ratio 0.1736" in text
    row = next(line for line in every.splitlines() if line.startswith("stage1.0.conv1")).split()
    assert row[1:] == "conv2d 32x16x3x3 1x16x32x32 1x32x32x32 0.4212 1,941 4,718,592 1,987,584 0.0726 4,608".split()


def test_html_has_the_groups_of_channels_unless_told_not_to(capsys):
    def data(*argv):
        _, text, _ = run(capsys, *argv, "--format", "html")
        start = text.index('type="application/json">') + len('type="application/json">')
        return json.loads(text[start : text.index("</script>", start)].replace("<\\/", "</"))["channels"]

    found = data("small_resnet", "--input", "1,1,8,8")
    groups = fxsparse.channel_groups(models.build("small_resnet"), torch.randn(1, 1, 8, 8))
    assert found["rows"] == groups.rows() and found["summary"] in groups.table()
    assert data("small_resnet", "--input", "1,1,8,8", "--no-channels") is None


def test_a_weight_that_is_used_at_every_step_is_listed_once_in_a_group(capsys):
    _, text, _ = run(capsys, "char_gru", "--sparsity", "0.75", "--depth", "1")
    gru = next(line for line in text.splitlines() if line.startswith("gru")).split()
    weights = 1536 * (128 + 512)
    assert gru[-1] == f"{weights + 2 * 1536:,}"
    assert float(gru[-6]) == pytest.approx(int(gru[-5].replace(",", "")) / weights, abs=1e-4)


def test_csv_markdown_and_json_agree(capsys):
    _, text, _ = run(capsys, *NET, "--format", "csv")
    convention, _, text = text.partition("\n")
    assert convention.startswith("# MACs of one forward pass")
    listed = list(csv.DictReader(io.StringIO(text)))
    data = json.loads(run(capsys, *NET, "--format", "json")[1])
    assert sum(int(row["MACs sparse"]) for row in listed) == data["macs"] == 27_379_136
    assert sum(int(row["MACs dense"]) for row in listed) == data["dense_macs"] == 157_730_048
    assert sum(float(row["share"]) for row in listed) == pytest.approx(1.0)
    markdown = run(capsys, *NET, "--format", "markdown")[1]
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert markdown.startswith("## wide_resnet22_2, sparsity 0.9, erk") and len(table) == 2 + 23 + 1
    assert len({line.count("|") for line in table}) == 1


def test_dot_holds_every_layer(capsys):
    text = run(capsys, *NET, "--format", "dot")[1]
    assert text.startswith('digraph "wide_resnet22_2, sparsity 0.9, erk" {')
    assert "stage3.2.conv2\\nconv2d\\ndensity 0.06" in text
    assert text.count("fillcolor") >= 23 and text.count("->") > 60


@pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz")
def test_svg_is_a_picture(capsys, tmp_path):
    assert run(capsys, *NET, "--format", "svg", "--output", str(tmp_path / "net.svg"))[0] == 0
    picture = ElementTree.parse(tmp_path / "net.svg").getroot()
    assert picture.tag.endswith("svg") and "stage1.0.conv1" in "".join(picture.itertext())


def test_svg_without_graphviz(capsys, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    code, _, error = run(capsys, *NET, "--format", "svg")
    assert code == 2 and "install Graphviz, or choose format dot" in error


def test_compare_puts_two_side_by_side(capsys):
    code, text, _ = run(
        capsys, "wide_resnet22_2", "--compare", "sparsity=0.9", "sparsity=0.9,distribution=uniform", "--depth", "1"
    )
    assert code == 0
    assert next(line for line in text.splitlines() if line.startswith("stage3")).split()[-1] == "1.3394"
    data = json.loads(run(capsys, "--compare", "resnet18", "resnet34", "--format", "json")[1])
    assert data["first"]["dense_macs"] == 1_814_073_344 and data["second"]["dense_macs"] == 3_663_761_408


def test_a_budget_and_the_training_ledger(capsys):
    _, text, _ = run(capsys, "wide_resnet22_2", "--flops", "0.2")
    assert "ratio 0.2000" in text
    _, text, _ = run(capsys, *NET, "--method", "rigl", "--steps", "1000", "--batch-size", "128")
    sparse, dense = 2 * 27_379_136, 2 * 157_730_048
    step = (300 * sparse + 2 * sparse + dense) / 101
    assert f"training step, rigl, averaged over an update interval: {step:,.0f} FLOPs an example" in text
    assert f"{step / 3 / dense:.4f} of dense" in text
    # Of 1000 steps, t = 100, ..., 700 have dense gradients.
    total = 128 * (993 * 3 * sparse + 7 * (2 * sparse + dense))
    assert f"training, planned: {total:.4g} FLOPs in 1,000 steps, 7 with dense gradients" in text
    twice = run(
        capsys, NET[0], *NET[1:], "--input", "2,3,32,32", "--method", "rigl", "--steps", "1000", "--batch-size", "128"
    )[1]
    assert twice.splitlines()[-2:] == text.splitlines()[-2:]  # however many examples were counted
    exact = run(capsys, *NET, "--method", "static", "--exact-backward")[1]
    first = 2 * 442_368  # the stem is dense under ERK; its input needs no gradient
    assert f"interval: {3 * sparse - first:,.0f} FLOPs" in exact


def test_a_factory_with_arguments(capsys):
    code, text, _ = run(
        capsys, "torch.nn:Linear", "--options", "in_features=4", "out_features=3", "--input", "2,5,4", "--also", "bias"
    )
    assert code == 0 and f"{2 * 120 + 30} FLOPs dense" in text


def test_micronet_convention(capsys):
    _, text, _ = run(capsys, "mobilenet_v1", "--convention", "micronet")
    assert text.startswith("FLOPs of one forward pass of the example in the micronet convention")
    assert "1,141,543,864 FLOPs dense" in text


@pytest.fixture
def saved(tmp_path):
    model = models.build("small_resnet", num_classes=7, in_channels=2)
    sparse = fxsparse.sparsify(model, torch.randn(1, 2, 8, 8), sparsity=0.8, verify=False)
    path = tmp_path / "sparse.pt"
    torch.save(sparse.state_dict(), path)
    return sparse, path


def test_a_saved_sparse_checkpoint(capsys, saved, tmp_path):
    sparse, path = saved
    code, text, _ = run(capsys, "small_resnet", "--checkpoint", str(path), "--format", "json")
    assert code == 0
    data = json.loads(text)
    assert (data["macs"], data["dense_macs"]) == (sparse.flops().macs, sparse.flops().dense_macs)
    folded = tmp_path / "folded.pt"
    torch.save({"state_dict": sparse.fold().state_dict()}, folded)
    assert (
        json.loads(run(capsys, "small_resnet", "--checkpoint", str(folded), "--format", "json")[1])["macs"]
        == data["macs"]
    )


def test_a_checkpoint_of_another_architecture_says_which_keys_differ(capsys, saved):
    _, path = saved
    code, _, error = run(capsys, "wide_resnet22_2", "--checkpoint", str(path))
    assert code == 2 and error.count("\n") == 1
    assert "is not a checkpoint of wide_resnet22_2: it lacks" in error and "more; it has" in error
    state = torch.load(path)
    last = next(key for key in reversed(state) if not key.endswith("_mask"))
    state["extra.weight"] = state.pop(last)
    torch.save(state, path)
    _, _, error = run(capsys, "small_resnet", "--checkpoint", str(path))
    assert f"it lacks {last}; it has extra.weight" in error


class Reads(nn.Module):
    """Control flow on data."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


BAD = {
    "unknown model": (("resnet5",), "unknown model 'resnet5'; did you mean resnet50"),
    "no model": ((), "give a model"),
    "sparsity 1": (("resnet18", "--sparsity", "1.0"), r"1.0 is outside [0, 1)"),
    "negative sparsity": (("resnet18", "--sparsity", "-0.1"), r"-0.1 is outside [0, 1)"),
    "both": (("resnet18", "--sparsity", "0.5", "--flops", "0.5"), "one of the two"),
    "budget": (("resnet18", "--flops", "1.5"), r"1.5 is outside (0, 1]"),
    "shape": (("resnet18", "--input", "1,4,224,224"), "in conv1 (Conv2d)"),
    "shape too": (("resnet18", "--input", "1,4,224,224"), "(1, 4, 224, 224), (64, 3, 7, 7)"),
    "no shape": (("resnet18", "--input", "1,a"), "'1,a' is not a shape"),
    "format": (("resnet18", "--format", "htm"), "did you mean html"),
    "category": (("resnet18", "--also", "bais"), "did you mean bias"),
    "convention": (("resnet18", "--convention", "x"), "not one of macs, micronet"),
    "distribution": (("resnet18", "--sparsity", "0.5", "--distribution", "erx"), "did you mean er"),
    "method": (("resnet18", "--method", "rigll"), "did you mean rigl"),
    "depth": (("resnet18", "--depth", "-1"), "-1 is negative"),
    "no checkpoint": (("resnet18", "--checkpoint", "/no/such"), "there is no checkpoint /no/such"),
    "no module": (("no_such_package:make",), "cannot import no_such_package"),
    "no factory": (("torch.nn:Lineal",), "did you mean Linear"),
    "factory without input": (("torch.nn:ReLU",), "--input 1,3,224,224"),
    "factory's arguments": (("torch.nn:Linear", "--input", "1,4"), "missing 2 required"),
    "no network": (("json:loads", "--options", 's="1"', "--input", "1"), "not an nn.Module"),
    "compare": (("resnet18", "--compare", "sparsty=1", "a"), "did you mean sparsity"),
    "compare as html": (("resnet18", "--compare", "sparsity=0", "sparsity=0", "--format", "html"), "does not compare"),
    "output": (("small_resnet", "--output", "/no/such/folder/x"), "could not write /no/such/folder/x"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(capsys, case):
    argv, message = BAD[case]
    code, out, error = run(capsys, *argv)
    assert code == 2 and out == ""
    assert error.count("\n") == 1 and error.startswith("fxsparse: error: ") and message in error


def test_a_model_that_cannot_be_traced_says_where(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    code, _, error = run(capsys, f"{Path(__file__).stem}:Reads", "--input", "1,4")
    assert code == 2 and f"{Path(__file__).name}:" in error and "if x.sum() > 0" in error


def test_a_damaged_checkpoint(capsys, tmp_path):
    path = tmp_path / "bad.pt"
    path.write_bytes(b"not a checkpoint")
    code, _, error = run(capsys, "resnet18", "--checkpoint", str(path))
    assert code == 2 and f"{path} is damaged" in error


class Unknown(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvalsh(x)


def test_strict_fails_on_operations_without_a_rule(capsys, monkeypatch):
    module = type(sys)("with_unknown")
    module.Unknown = Unknown
    monkeypatch.setitem(sys.modules, "with_unknown", module)
    argv = ("with_unknown:Unknown", "--input", "3,3")
    code, out, _ = run(capsys, *argv)
    assert code == 0 and "not counted: aten._linalg_eigh" in out
    code, _, error = run(capsys, *argv, "--strict")
    assert code == 1 and "aten._linalg_eigh in " in error and Path(__file__).name in error
