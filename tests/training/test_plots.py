"""Pictures of finished runs, and life without matplotlib."""

import json
import sys

import pytest

from fxsparse.training import plots


@pytest.fixture
def run_folders(tmp_path):
    folders = []
    for method, density in (("dense", 1.0), ("rigl", 0.1)):
        folder = tmp_path / method
        folder.mkdir()
        result = {
            "method": method,
            "model": "m",
            "data": "d",
            "watched_split": "test",
            "test_accuracy": 0.5,
            "test_loss": 1.0,
        }
        result |= {"sparsity": 1 - density, "densities": {"a.weight": density, "b.weight": density / 2}}
        (folder / "result.json").write_text(json.dumps(result))
        lines = [{"kind": "eval", "step": s, "split": "test", "accuracy": s / 10} for s in (1, 5)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        folders.append(folder)
    return folders


def test_the_picture_shows_every_runs_curve_and_densities(run_folders, tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    figures = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda figure, path, **more: figures.append((figure, path)))
    assert plots.draw(run_folders, tmp_path / "both.png")
    ((figure, path),) = figures
    left, right = figure.axes
    assert path == tmp_path / "both.png"
    assert [line.get_xydata().tolist() for line in left.lines] == [[[1, 0.1], [5, 0.5]]] * 2
    assert [bar.get_height() for bar in right.patches] == [1.0, 0.5, 0.1, 0.05]
    assert [label.get_text() for label in right.get_xticklabels()] == ["a", "b"]
    assert left.get_legend().get_texts()[1].get_text().startswith("rigl")


def test_it_is_a_png(run_folders, tmp_path):
    pytest.importorskip("matplotlib")
    assert plots.draw_or_explain(run_folders, tmp_path / "both.png") == f"picture: {tmp_path / 'both.png'}"
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(run_folders, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plots.draw_or_explain(run_folders, tmp_path / "both.png") == "no picture: pip install matplotlib"
    assert not (tmp_path / "both.png").exists()


def test_an_unwritable_picture_is_a_word_not_an_error(run_folders, tmp_path):
    pytest.importorskip("matplotlib")
    assert "could not write" in plots.draw_or_explain(run_folders, tmp_path / "nowhere" / "both.png")
