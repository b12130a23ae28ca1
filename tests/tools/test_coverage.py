"""The survey of what is captured: a dozen models of all sets, its limits, and its page."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "coverage.py"

pytest.importorskip("timm")
pytest.importorskip("transformers")

QUICK = {
    "torchvision": ["squeezenet1_1", "shufflenet_v2_x0_5", "ssdlite320_mobilenet_v3_large"],
    "timm": ["test", "mobilevit", "lcnet"],
    "transformers": ["bert", "llama", "t5", "whisper", "marian"],
    "zoo": ["tied_linear", "data_loop", "autocast_region"],
}


@pytest.fixture
def survey(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("survey.sets"), importlib.import_module("survey.runner")


def coverage(folder, *argv, check=True):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--folder", folder, *argv],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert not check or done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return done


def rows_in(folder):
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("which", QUICK)
def test_a_few_models_of_every_set_meet_the_goal(which, tmp_path):
    argv = [item for name in QUICK[which] for item in ("--only", name)]
    coverage(tmp_path, "--set", which, *argv, "--check")
    rows = rows_in(tmp_path)
    assert {row["model"] for row in rows} == set(QUICK[which])
    for row in rows:
        assert row["eval"] == 0 and row["train"] == 0 and row["keys"] and row["silent"] == 0
        assert row["weights"] > 0 and row["masked"] == row["weights"]
        assert row["other_batch"] in ("same", "the model itself takes no other")


def test_the_sets_have_as_many_models_as_the_goals_say(survey):
    import timm

    sets, _ = survey
    assert len(sets.names("torchvision")) == 109 and len(sets.names("transformers")) == 48
    families = {sets.timm_family(name) for name in timm.list_models()}
    table = sets.timm_table()
    assert set(table) == families and len(families) == 209
    assert all(sets.timm_family(name) == family for family, (name, *_) in table.items())
    assert {name for name, *_ in table.values()} <= set(timm.list_models())


def test_rows_are_kept_and_a_page_is_written(tmp_path):
    argv = ["--set", "zoo", "--only", "tied_*", "--write", tmp_path / "page.md"]
    coverage(tmp_path, *argv)
    before = rows_in(tmp_path)
    file = tmp_path / "zoo.jsonl"
    file.write_text(file.read_text() + '{"set": "zoo", "mod')  # a run that was killed while it wrote
    coverage(tmp_path, *argv)
    assert file.read_text().count("\n") == len(before)
    coverage(tmp_path, *argv, "--rerun")
    assert file.read_text().count("\n") == 2 * len(before)
    page = (tmp_path / "page.md").read_text()
    assert "| tied_linear" in page and "make coverage" in page and "Nothing." in page


def sleeper(which, name):
    if name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "raises":
        raise ValueError("no such thing")
    if name == "eats":
        kept = b"1" * (1500 * 2**20)
        time.sleep(60)
        return len(kept)
    if name == "sleeps":
        time.sleep(60)
    return {"set": which, "model": name, "status": "captured"}


def test_limits_and_deaths_are_rows(survey, tmp_path):
    _, runner = survey
    jobs = [("zoo", name) for name in ("fine", "dies", "raises", "eats", "sleeps")]
    began = time.perf_counter()
    own = runner._gigabytes(os.getpid())
    runner.run(jobs, sleeper, tmp_path, at_once=2, limits=runner.Limits(4, own + 0.4))
    assert time.perf_counter() - began < 30
    reasons = {name: row.get("reason", "") for (_, name), row in runner.read_rows(tmp_path).items()}
    assert reasons["fine"] == "" and "ended with code -9" in reasons["dies"]
    assert "ValueError: no such thing" in reasons["raises"] and "longer than 4 seconds" in reasons["sleeps"]
    assert "GB of memory" in reasons["eats"]


def test_weights_are_counted_without_fxsparse(survey):
    import torch
    import torch.nn.functional as F
    from torch import nn

    measure = importlib.import_module("survey.measure")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(9, 4)
            self.head = nn.Linear(4, 9)
            self.head.weight = self.embedding.weight
            self.attention = nn.MultiheadAttention(4, 2)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.free, self.bare = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(5, 4))
            self.unused = nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.ones(1, 4))

        def forward(self, tokens):
            x = self.normed(self.embedding(tokens)) * self.scale
            x = self.attention(x, x, x)[0] + x
            return self.head(F.linear(x @ self.free.T, self.bare)[..., :4])

    found = measure.weight_names(Net(), torch.tensor([[1, 2]]))
    assert set(found) == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "normed.parametrizations.weight.original1",
        "free",
        "bare",
    }
