"""The benchmark of sparse kernels: what it computes from times, what it keeps, and one run with real processes."""

import json
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
from bench_parts import peers, storage  # noqa: E402
from bench_parts.peers import Left, Worker  # noqa: E402
from bench_sparse import bounds, command, measure, networks, single_layers, sweep  # noqa: E402
from bench_sparse.goals import WORKS  # noqa: E402
from bench_sparse.results import Results, page, table  # noqa: E402

import fxsparse  # noqa: E402

QUICK = measure.Settings(rounds=2, seconds=0.0)


class FakeWorker:
    """Gives each contender the seconds that the test wrote down; an exception is raised instead."""

    seconds: ClassVar[dict] = {}

    def __init__(self, python, threads):
        self.process, self.keys = self, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    close = __exit__

    def poll(self):
        return None

    def load(self, contender, case):
        if case["kind"] == "layers":
            self.keys.append((contender, case.get("variant", case.get("format")), case["layer"][2]))
            return {"number": len(self.keys) - 1, "error": 1e-6, "facts": {}}
        self.keys.append((contender, case.get("format", case.get("variant")), case["sparsity"]))
        found = self._seconds(len(self.keys) - 1)
        return {"number": len(self.keys) - 1, "error": 0.0, "facts": {"bytes": found}}

    def run(self, number, seconds):
        return [[(self._seconds(number), 0.01)]]

    def drop(self, number):
        pass

    def _seconds(self, number):
        contender, kind, sparsity = self.keys[number]
        found = self.seconds.get((contender, kind, sparsity), self.seconds.get((contender, sparsity), 9.0))
        if isinstance(found, BaseException):
            raise found
        return found


@pytest.fixture
def fake(monkeypatch):
    """`fake({...}, *options)` runs the command with these seconds and gives its results."""
    monkeypatch.setattr(measure, "Worker", FakeWorker)
    monkeypatch.setattr(measure, "python_of", lambda name, install=True: "python")

    def run(path, seconds, *options):
        parser = command.argparse.ArgumentParser()
        command.add_arguments(parser)
        FakeWorker.seconds = seconds
        code = command.bench_sparse(parser.parse_args([*options, "--json", str(path)]))
        return code, json.loads(path.read_text())["groups"] if path.exists() else []

    return run


TIMES = {
    ("eager", "contiguous", None): 0.8,
    ("eager", "channels_last", None): 0.6,
    ("onnxruntime", None): 0.5,
    ("openvino", None): 0.4,
    ("ours", 0.9): 0.125,
    ("ours", 0.95): 0.2,
}


def test_the_ratio_is_to_the_fastest_other(fake, tmp_path, capsys):
    fake(tmp_path / "r.json", TIMES, "--rows", "resnet50", "--sparsities", "0.9", "0.95", "--threads", "1")
    at_90, at_95 = table(Results(tmp_path / "r.json"))
    assert at_90[:7] == ["resnet50", 1, "90%", "125.00 ms", "OpenVINO", "400.00 ms", "3.20x"]
    assert at_90[-2:] == ["2.5x", "yes"] and at_95[6:] == ["2.00x", "2.00x", "1.00x", "0e+00", "4x", "no"]
    assert "3.20x" in capsys.readouterr().out and "| resnet50" in page(Results(tmp_path / "r.json"))


def test_a_contender_that_fails_is_named_and_the_rest_goes_on(fake, tmp_path, capsys):
    times = {**TIMES, ("openvino", None): Left("no such library"), ("ours", 0.95): Left("KernelError: no compiler")}
    _, (group,) = fake(tmp_path / "r.json", times, "--rows", "resnet50", "--threads", "1")
    assert {r["label"]: r["failed"] for r in group["records"] if r["failed"]} == {
        "OpenVINO": "no such library",
        "fxsparse": "KernelError: no compiler",
    }
    at_80, at_90, at_95 = table(Results(tmp_path / "r.json"))
    assert at_90[4:7] == ["ONNX Runtime", "500.00 ms", "4.00x"] and at_80[6] == "0.06x"
    assert at_95[3:6] == ["failed: KernelError: no compiler", "ONNX Runtime", "500.00 ms"] and at_95[-1] == "no"
    assert "no such library" in capsys.readouterr().err


def test_wrong_numbers_are_not_timed(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeWorker, "load", lambda *_: {"number": 0, "error": float("nan"), "facts": {}})
    _, (group,) = fake(tmp_path / "r.json", {}, "--rows", "char_gru", "--threads", "1")
    assert all(r["failed"].startswith("wrong numbers") and "least" not in r for r in group["records"])


def test_bytes_are_a_share_of_dense(fake, tmp_path):
    bytes_kept = {("eager", None): 0.01, ("ours", 0.8): 0.0046, ("ours", 0.9): 0.0025, ("ours", 0.95): 0.001}
    _, groups = fake(tmp_path / "r.json", bytes_kept, "--rows", "storage", "--threads", "1", "2")
    assert len(groups) == 1
    assert [(line[6], line[-1]) for line in table(Results(tmp_path / "r.json"))] == [
        ("0.460", "no"),
        ("0.250", "yes"),
        ("0.100", "yes"),
    ]


def test_layers_are_compared_to_the_better_variant_by_geometric_mean(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(single_layers, "distinct_layers", lambda case: [(8, 8, 1, 1, 4), (8, 8, 3, 1, 4)])
    over = {("sparseprop", "over batch", 1): 0.4, ("sparseprop", "over width", 1): 0.8}
    over |= {("sparseprop", "over batch", 3): 0.9, ("sparseprop", "over width", 3): 0.8}
    seconds = {**over, ("ours", None, 1): 0.1, ("ours", None, 3): 0.8, ("eager", "contiguous", 1): 0.01}
    fake(tmp_path / "r.json", seconds, "--rows", "layers", "--sparsities", "0.9", "--threads", "1")
    ((*_, ratio, _, _, error, _, met),) = table(Results(tmp_path / "r.json"))
    assert ratio == "2.00x" and met == "yes" and error == "1e-06"  # the square root of 4 * 1; dense does not count


def test_ctrl_c_keeps_finished_rows_and_resume_goes_on(fake, tmp_path):
    rows = ("--rows", "char_gru", "mobilenet_v1", "--threads", "1", "--sparsities", "0.9")
    times = {("ours", 0.9): 0.1, ("inductor", "channels_last", None): KeyboardInterrupt()}
    code, groups = fake(tmp_path / "r.json", times, *rows)
    assert code == 130 and [group["row"] for group in groups] == ["char_gru"]
    code, groups = fake(tmp_path / "r.json", {("ours", 0.9): 0.3}, *rows, "--resume")
    ours = {group["row"]: group["records"][-1]["least"] for group in groups}
    assert code == 0 and ours == {"char_gru": 0.1, "mobilenet_v1": 0.3}
    _, groups = fake(
        tmp_path / "r.json", {("ours", 0.9): 0.2}, "--rows", "char_gru", *rows[3:], "--rounds", "3", "--resume"
    )
    ours = {group["row"]: group["records"][-1]["least"] for group in groups}
    assert ours == {"char_gru": 0.2, "mobilenet_v1": 0.3}  # measured otherwise: anew


def test_results_of_another_machine_are_not_mixed_in(fake, tmp_path, capsys):
    fake(tmp_path / "r.json", TIMES, "--rows", "resnet50", "--threads", "1")
    held = json.loads((tmp_path / "r.json").read_text())
    held["machine"]["processor"] = "another"
    (tmp_path / "r.json").write_text(json.dumps(held))
    assert Results(tmp_path / "r.json").groups == [] and "another machine" in capsys.readouterr().out


def test_a_rewiring_step_counts_by_a_hundredth():
    cycles = [[0.2, 0.1, 0.1, 0.7], [0.3, 0.1, 0.1, 0.9], [0.2, 0.1, 0.1, 1.9]]
    found = measure.summary([[[seconds, 0.05] for seconds in cycle] for cycle in cycles])
    assert found["cpu"] == pytest.approx(0.05)
    assert found["least"] == pytest.approx((98 * 0.1 + 0.2 + 0.7) / 100)
    assert found["median"] == pytest.approx((98 * 0.1 + 0.2 + 0.9) / 100)


def test_break_even():
    assert sweep.break_even(1.0, {0.5: 3.0, 0.8: 1.5, 0.9: 0.5}) == (pytest.approx(0.85), "85%")
    assert sweep.break_even(1.0, {0.5: 0.9, 0.9: 0.5}) == (None, "<50%")
    assert sweep.break_even(1.0, {0.5: 0.9, 0.9: 1.0}) == (None, ">90%")
    assert sweep.break_even(1.0, {0.5: 0.9, 0.7: 1.2, 0.8: 0.8, 0.9: 0.4})[1] == "75%"  # not from 50% on


def test_kept_bytes_are_those_of_every_storage_once():
    model = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 4, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    numel = 10 * 6 + 6 + 6 * 4
    assert storage.kept_bytes(model, optimizer) == 4 * numel
    model(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    assert storage.kept_bytes(model, optimizer) == 4 * 3 * numel
    pattern = torch.zeros(5, dtype=torch.int32)
    model.pattern = {"rows": (pattern, pattern[2:])}
    model.call = lambda: torch.zeros(3)[pattern.long()] if pattern is not None else None
    assert storage.kept_bytes(model, optimizer) == 4 * 3 * numel + 20
    rows, columns = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2])
    model.csr = torch.sparse_csr_tensor(rows, columns, torch.ones(3))
    assert storage.kept_bytes(model, optimizer) == 4 * 3 * numel + 20 + 8 * (4 + 3) + 4 * 3


def test_distinct_layers_of_the_reports_resnet50():
    layers = single_layers.distinct_layers(WORKS["layers"].case())
    assert len(layers) == len(set(layers)) == 23 and (3, 64, 3, 1, 32) not in layers
    assert (2048, 100, 0, 0, 0) in layers and (256, 256, 3, 2, 16) in layers
    assert single_layers.macs((256, 128, 3, 2, 15), 2) == 2 * 256 * 128 * 9 * 64


@pytest.fixture
def masked_as_lowered(monkeypatch):
    """Stands in for the kernels: `lower` leaves the module as it is."""
    monkeypatch.setattr(fxsparse.SparseModule, "lower", lambda self, train=False, layers="auto": self, raising=False)


TINY = {
    "network": "small_resnet",
    "batch": 4,
    "size": 8,
    "classes": 10,
    "options": {"method": "rigl", "distribution": "uniform"},
    "sparsity": 0.8,
    "threads": 1,
}


@pytest.mark.parametrize("kind", ["inference", "training", "storage"])
def test_ours_is_checked_against_masked_eager(masked_as_lowered, kind):
    from bench_sparse.contenders import ours

    loaded = ours({**TINY, "kind": kind})
    assert loaded.error < 1e-5 and 0.2 <= loaded.facts["density"] < 0.3
    assert len(loaded.turn()) == (1 if kind == "inference" else 4)
    if kind == "storage":  # weight, gradient and momentum in 4 bytes each, masks in 1
        sparse, *_ = networks.sparse_network({**TINY, "kind": kind})
        least = sum(12 * p.numel() for p in sparse.parameters()) + sum(m.numel() for m in sparse.masks.values())
        assert least < loaded.facts["bytes"] < 1.1 * least


def test_a_wrong_training_step_shows(masked_as_lowered):
    """One weight that is active here and not there is an error far above what is accepted."""
    sparse, reference, x = networks.sparse_network({**TINY, "kind": "training"})
    weight = next(module.weight for module in reference.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        weight[0] *= 1.5
    error = networks.step_error(sparse, sparse, reference, x, networks.labels_for(TINY))
    assert error > measure.LARGEST_ERROR["training"]


@pytest.mark.parametrize("shape", [(6, 5, 3, 2, 7), (6, 5, 1, 1, 4), (6, 5, 0, 0, 0)])
def test_single_layers_are_checked(masked_as_lowered, shape):
    case = {"layer": shape, "batch": 2, "sparsity": 0.5, "options": {}}
    assert single_layers.lowered_layer(case).error < 1e-5
    layer, *_ = single_layers.make(case)
    weight = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.view(-1)[0] *= 1.1
    assert single_layers.checked(layer, weight, case).error > 1e-4


def test_real_processes():
    """One contender that runs and one that cannot, each in a process of its own."""
    entrants = [measure.Entrant("eager", "eager", more={"format": "channels_last"})]
    entrants.append(measure.Entrant("nobody", "eager", more={"network": "no_such_net"}))
    ran, failed = measure.measure({**TINY, "kind": "training"}, entrants, 1, QUICK, lambda text: None)
    assert ran["failed"] is None and ran["error"] < 1e-3 and ran["least"] > 0 and ran["times"] >= 2
    assert "unknown model 'no_such_net'" in failed["failed"] and "least" not in failed


def test_a_process_that_dies_is_told():
    with Worker(sys.executable, 1) as worker:
        worker.process.kill()
        with pytest.raises(Left, match="the process ended"):
            worker.load("eager", {})


def test_an_environment_that_does_not_install_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    monkeypatch.setattr(peers, "_failed", {})
    with pytest.raises(Left, match="openvino is not installed"):
        peers.python_of("openvino", install=False)
    peers._failed.clear()
    monkeypatch.setattr(peers.sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(Left, match=r"openvino does not install: .*No such file"):
        peers.python_of("openvino")
    monkeypatch.setattr(peers, "_made", None)  # it is not tried again
    with pytest.raises(Left, match="No such file"):
        peers.python_of("openvino")


def test_the_line_that_tells_why_an_installation_failed(tmp_path):
    script = "import sys; sys.exit('warning: old\\nerror: no compiler\\nhint: get one')"
    with pytest.raises(Left, match=r"^spam does not install: error: no compiler$"):
        peers._ran([sys.executable, "-c", script], tmp_path / "spam")


def test_the_picture_and_the_page_of_the_layers(tmp_path):
    results = Results(tmp_path / "r.json")
    results.bounds = {"1": {"peak_gmacs": 100.0, "l2_gmacs": 50.0, "L2_gbs": 200.0}}
    for shape in ((64, 64, 1, 1, 8), (64, 64, 3, 2, 8)):
        records = [{"role": "dense", "failed": None, "least": 0.002}]
        records += [{"role": "ours", "failed": None, "sparsity": s, "least": 0.006 * (1 - s)} for s in sweep.SPARSITIES]
        results.add(
            {
                "row": "sweep",
                "threads": 1,
                "layer": single_layers.name_of(shape),
                "shape": list(shape),
                "sparsities": list(sweep.SPARSITIES),
                "settings": {"batch": 32},
                "records": records,
            }
        )
    text = sweep.sweep_page(results, tmp_path / "layers.svg")
    assert "| 3x3 64->64 8x8 stride 2 |" in text and "67%" in text and "layers.svg" in text
    assert sweep.gmacs(results.groups[0], 0.5, 0.003) == pytest.approx(3 * 32 * 64 * 64 * 64 * 0.5 / 0.003 / 1e9)
    drawn = (tmp_path / "layers.svg").read_text()
    assert drawn.startswith("<?xml") and "<svg" in drawn


def test_help_names_every_row(capsys):
    parser = command.argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert all(row in shown for row in WORKS)


def test_bounds_are_measured():
    """A float of 4 bytes for each multiply-add."""
    found = bounds.measured_bounds(1)
    assert found["peak_gmacs"] > 1 and ("L2_gbs" not in found or found["l2_gmacs"] == found["L2_gbs"] / 4)
