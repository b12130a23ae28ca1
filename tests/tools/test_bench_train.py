"""The benchmark of training: what it computes from times, what it keeps, how it counts bytes, and the contenders."""

import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
from bench_parts.peers import Left  # noqa: E402
from bench_train import command, measure  # noqa: E402
from bench_train import goals as goals_file  # noqa: E402
from bench_train.memory import peak_on_cpu  # noqa: E402
from bench_train.page import page  # noqa: E402
from bench_train.results import Results, exactness, figures, goals, table  # noqa: E402
from bench_train.trainers import TRAINERS  # noqa: E402
from bench_train.worker import Run  # noqa: E402

END = {
    "steps": 100,
    "rewirings": 24,
    "losses": [2.0, 1.0],
    "finite": True,
    "layers": 3,
    "wrong_layers": 0,
    "stray": 0,
    "sparsity": 0.9,
    "moved": 0.5,
}


class FakeWorker:
    """Gives each contender the seconds that the test wrote down: of a step, an update step, a rewiring."""

    seconds: ClassVar[dict] = {}
    end: ClassVar[dict] = {}

    def __init__(self, python, threads):
        self.label = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    close = __exit__

    def load(self, contender, case):
        self.label = contender + {None: "", "default": " compiled"}[case["compile"]]
        if isinstance(self.seconds.get(self.label), BaseException):
            raise self.seconds[self.label]
        return {"number": 0, "first_loss": 2.0}

    def ask(self, request):
        if request["do"] == "sparsify":
            return {"seconds": 1.5}
        if request["do"] == "end":
            return {**END, **self.end.get(self.label, {})}
        if request["do"] == "memory":
            return {"ordinary": 100, "update": 130} if "dense" not in self.label else {"ordinary": 80}
        step, update, rewiring = self.seconds.get(self.label, (0.4, 0.9, 0.6))
        found = {"step": [step, 2 * step]}
        return found if "dense" in self.label else {**found, "update": [update, update], "rewiring": [rewiring] * 2}


@pytest.fixture
def fake(monkeypatch):
    """`fake(path, seconds, *options)` runs the command with these seconds and gives its results."""
    monkeypatch.setattr(measure, "Worker", FakeWorker)
    monkeypatch.setattr(measure, "python_of", lambda name, install=True: "python")
    monkeypatch.setattr(FakeWorker, "end", {})

    def run(path, seconds, *options):
        parser = command.argparse.ArgumentParser()
        command.add_arguments(parser)
        FakeWorker.seconds = seconds
        code = command.bench_train(parser.parse_args([*options, "--json", str(path)]))
        return code, json.loads(path.read_text())["cpu"]["groups"] if path.exists() else []

    return run


TIMES = {
    "dense": (0.2, 0, 0),
    "fxsparse": (0.21, 0.3, 0.1),
    "dense compiled": (0.1, 0, 0),
    "fxsparse compiled": (0.102, 0.2, 0.05),
}


def test_figures_are_over_dense_in_the_same_mode(fake, tmp_path, capsys):
    code, (group,) = fake(tmp_path / "r.json", TIMES, "--rows", "resnet50", "--write", str(tmp_path / "page.md"))
    found = {record["label"]: figures(record, group["records"]) for record in group["records"]}
    assert code == 0 and found["dense eager"] == found["dense compiled"] == {}
    assert found["fxsparse eager"] == pytest.approx(
        {
            "step": 1.05,
            "rewiring": 0.5,
            "overhead": (99 * 0.21 + 0.3) / 100 / 0.2,
            "memory": 1.25,
            "update_memory": 130 / 80,
        }
    )
    assert found["fxsparse compiled"]["step"] == pytest.approx(1.02) and found["rigl-torch"]["step"] == pytest.approx(2)
    reached = {line[0]: line[2] for line in goals(Results(tmp_path / "r.json", "cpu").sections)}
    assert reached["masked step over dense, eager, resnet50"] == "1.050x, missed"
    assert reached["the same, compiled"] == "1.020x, met"
    assert reached["one rewiring of resnet50, in dense steps"] == "0.50, missed"
    assert reached["`sparsify(resnet50)`, all passes and verify"] == "not run"
    text = (tmp_path / "page.md").read_text()
    assert "| 1.050x" in text and "not run: vit_b_16, wide_resnet22_2" in text and "--device cuda" in text
    assert "1.020x" in capsys.readouterr().out


def test_a_trial_with_another_batch_meets_no_goal(fake, tmp_path):
    fake(tmp_path / "r.json", TIMES, "--rows", "resnet50", "--batch", "2")
    assert {line[2] for line in goals(Results(tmp_path / "r.json", "cpu").sections)} <= {"not run", "-"}


def test_a_contender_that_fails_is_named_and_the_rest_goes_on(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(
        FakeWorker,
        "end",
        {
            "sparsimony": {"losses": [1.0, 1.5]},
            "fxsparse compiled": {"moved": 0.0},
            "fxsparse": {"wrong_layers": 1, "stray": 7},
        },
    )
    code, (group,) = fake(tmp_path / "r.json", {**TIMES, "rigl-torch": Left("no such package")}, "--rows", "resnet50")
    failed = {r["label"]: r["failed"] for r in group["records"] if r["failed"]}
    assert failed == {
        "rigl-torch": "no such package",
        "sparsimony": "it does not train: loss 1.000 at first, 1.500 after 100 steps",
        "fxsparse compiled": "its masks did not change in 100 steps",
    }
    lines = {line[1]: line for line in table([group], ["resnet50"])}
    assert code == 1 and lines["rigl-torch"][2] == "left out: no such package"
    assert lines["fxsparse eager"][-2] == "no after 100 steps, 24 rewirings: 1 layers, 7 weights"
    reached = {line[0]: line[2] for line in goals({"cpu": {"groups": [group]}})}
    assert reached["the same, compiled"] == "missed: its masks did not change in 100 steps"


def test_what_was_left_out_is_not_run(fake, tmp_path):
    code, (group,) = fake(tmp_path / "r.json", TIMES, "--rows", "resnet50", "--without", "fxsparse compiled")
    reached = {line[0]: line[2] for line in goals({"cpu": {"groups": [group]}})}
    assert code == 0 and reached["the same, compiled"] == "not run"


def test_ctrl_c_keeps_finished_rows_and_resume_goes_on(fake, tmp_path):
    times = {**TIMES, "sparsimony": KeyboardInterrupt()}
    code, groups = fake(tmp_path / "r.json", times, "--rows", "sparsify", "resnet50")
    assert code == 130 and [group["row"] for group in groups] == ["sparsify"]
    code, groups = fake(tmp_path / "r.json", TIMES, "--rows", "sparsify", "resnet50", "--resume")
    assert code == 0 and [group["row"] for group in groups] == ["sparsify", "resnet50"]
    _, groups = fake(tmp_path / "r.json", {}, "--rows", "resnet50", "--resume")
    assert groups[-1]["records"][0]["least"]["step"] == 0.2
    _, groups = fake(tmp_path / "r.json", {}, "--rows", "resnet50", "--resume", "--rounds", "3")
    assert groups[-1]["records"][0]["least"]["step"] == 0.4  # measured otherwise: anew


def test_what_another_device_measured_stays(fake, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"cuda": {"machine": {"gpu": "one"}, "groups": []}}))
    fake(path, TIMES, "--rows", "sparsify")
    assert json.loads(path.read_text())["cuda"] == {"machine": {"gpu": "one"}, "groups": []}


@pytest.mark.parametrize("loss, fine", [(2.001, True), (2.1, False)])
def test_compiled_numbers_are_those_of_eager_mode(loss, fine):
    records = [{"label": "fxsparse eager", "failed": None, "first_loss": 2.0}]
    mine = {"label": "fxsparse compiled", "failed": None, "first_loss": loss}
    with contextlib.nullcontext() if fine else pytest.raises(Left, match="wrong numbers"):
        measure.check_first_loss(mine, records, "fp32")


def test_wrong_options_are_one_line(tmp_path, capsys):
    parser = command.argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.bench_train(parser.parse_args(["--rounds", "0"])) == 2
    assert capsys.readouterr().err == "error: --rounds 0: it must be at least 1\n"
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert all(row in shown for row in command.ROWS) and '"dense CUDA graphs"' in shown


def test_the_peak_is_that_of_all_tensors_at_once():
    """Kept: 4,000 bytes. Above that 8,000, then 20,000 more while the 8,000 are gone, then 12,000."""
    kept = torch.zeros(1000)

    def call():
        first = torch.zeros(2000)
        del first
        second = torch.zeros(5000)
        del second
        third = torch.zeros(3000)
        return third.sum()

    assert 24_000 <= peak_on_cpu(call, [kept]) <= 24_000 + 512


@pytest.mark.parametrize("compiled", [False, True])
def test_the_peak_of_a_training_step(compiled):
    """Weights and momentum before it; gradients, and one hidden layer's values and their gradients, in it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Tanh(), nn.Linear(512, 8, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    x = torch.randn(64, 256)

    def step():
        optimizer.zero_grad()
        run(x).square().sum().backward()
        optimizer.step()

    step(), optimizer.zero_grad()
    weights, hidden = 4 * (256 * 512 + 512 * 8), 4 * 64 * 512
    peak = peak_on_cpu(step, model, optimizer, x)
    least = 2 * weights + x.nbytes + weights  # gradients of all weights at the end
    assert least <= peak <= least + 4 * hidden + weights


TINY = {
    "network": "small_resnet",
    "device": "cpu",
    "batch": 8,
    "size": 8,
    "classes": 10,
    "precision": "fp32",
    "format": "contiguous",
    "lr": 0.05,
    "sparsity": 0.8,
}


@pytest.fixture
def tiny(monkeypatch):
    """Pictures have as many channels as the tiny network takes."""
    from bench_train import trainers

    monkeypatch.setattr(
        trainers,
        "network",
        lambda case: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)),
    )


def available(name):
    module = {"rigl-torch": "rigl_torch", "sparsimony": "sparsimony"}.get(name)
    return module is None or importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("compiled", [None, "default"])
@pytest.mark.parametrize("precision, layout", [("fp32", "contiguous"), ("bf16", "channels_last")])
@pytest.mark.parametrize("name", list(TRAINERS))
def test_the_contenders_train_and_rewire(tiny, name, precision, layout, compiled, monkeypatch):
    if not available(name):
        pytest.skip(f"{name} is not installed here")
    if compiled:
        torch._dynamo.reset()
        compile = torch.compile
        monkeypatch.setattr(torch, "compile", lambda model, mode, fullgraph: compile(model, backend="eager"))
    run = Run(name, {**TINY, "precision": precision, "format": layout, "compile": compiled})
    for _ in range(3):
        times = run.turn()
        assert set(times) == ({"step"} if name == "dense" else {"step", "update", "rewiring"})
    memory = run.memory()
    weights = sum(p.nbytes for p in run.trainer.model.parameters())
    assert memory["ordinary"] > 3 * weights
    end = run.end(40)
    assert measure.fault(end) is None
    if name != "dense":
        assert end["steps"] == 40 and end["rewirings"] >= 9 and exactness(end).startswith("yes after 40 steps")
        assert end["moved"] > 0.1 and abs(end["sparsity"] - 0.8) < 0.01 and end["layers"] == 2


def test_a_weight_beside_the_mask_is_not_exact(tiny):
    run = Run("fxsparse", TINY)
    name, mask = next(iter(run.trainer.model.masks.items()))
    with torch.no_grad():
        run.trainer.model.get_parameter(name)[~mask] = 1.0
    end = run.end(0)
    assert end["stray"] == int((~mask).sum()) and exactness(end).startswith("no")
    with torch.no_grad():
        mask.fill_(True)
    assert run.end(0)["wrong_layers"] == 1


def test_a_turn_without_a_rewiring_is_no_turn(tiny):
    run = Run("fxsparse", TINY)
    run.step()
    with pytest.raises(RuntimeError, match="0 rewirings in a step"):
        run.turn()


def test_every_goal_is_measured_somewhere():
    for goal in goals_file.GOALS:
        assert bool(goal.figure) != bool(goal.otherwise)
        assert goal.row in command.ROWS or goal.otherwise
        labels = {entrant.label for device in goal.bounds for entrant in measure.entrants_on(device)}
        assert goal.contender in labels | set(goals_file.SPARSIFY) | {""}


@pytest.mark.slow
def test_real_processes(tmp_path):
    """Dense and ours in processes of their own, in a file of results and a page."""
    parser = command.argparse.ArgumentParser()
    command.add_arguments(parser)
    options = ["--rows", "wide_resnet22_2", "--batch", "4", "--rounds", "1", "--steps", "8"]
    options += ["--without", "dense compiled", "fxsparse compiled", "rigl-torch", "sparsimony"]
    assert command.bench_train(parser.parse_args([*options, "--write", str(tmp_path / "page.md")])) == 0
    (group,) = Results(tmp_path / "page.json", "cpu").groups
    assert {r["label"]: r["failed"] for r in group["records"]} == {
        "dense eager": None,
        "fxsparse eager": None,
        **dict.fromkeys(options[-4:], goals_file.ABSENT),
    }
    assert "fxsparse eager" in page(Results(tmp_path / "page.json", "cpu").sections)
