"""`tools/demo.py`: the whole main job, shortened."""

import importlib.util
import sys
from pathlib import Path

import pytest

from fxsparse.training import Result

PROGRAM = Path(__file__).resolve().parents[2] / "tools" / "demo.py"


@pytest.fixture
def demo(monkeypatch):
    spec = importlib.util.spec_from_file_location("demo", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["demo.py", *flags])
        return module.main()

    return call


def test_three_runs_a_table_and_a_picture(demo, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "demo"
    assert demo("--steps", "80", "--out", str(out)) == 0
    table = capsys.readouterr().out
    results = {m: Result.from_json((out / m / "result.json").read_text()) for m in ("dense", "static", "rigl")}
    for method, result in results.items():
        (row,) = [line for line in table.splitlines() if line.startswith(method)]
        assert f"{result.test_accuracy:.4f}" in row
        assert result.steps == 80
    assert results["dense"].density == 1.0
    assert results["static"].density == results["rigl"].density == pytest.approx(0.1, abs=1e-3)
    assert results["static"].training_flops < results["rigl"].training_flops < 1.0
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")

    (out / "stale").touch()
    assert demo("--steps", "2", "--out", str(out)) == 0  # recreated
    assert not (out / "stale").exists()


def test_a_folder_of_something_else_is_left_alone(demo, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert demo("--steps", "2", "--out", str(tmp_path)) == 2
    assert "not a folder of this demonstration" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_wrong_value_is_one_line_and_recreates_nothing(demo, tmp_path, capsys):
    assert demo("--steps", "0", "--out", str(tmp_path / "demo")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "demo").exists()
