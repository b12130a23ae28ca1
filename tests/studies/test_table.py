"""Tables worked by hand from results made by hand: means, spreads, groups, the best, what is missing."""

import csv
import io
import json

import pytest

from fxsparse.core.errors import ConfigError
from fxsparse.studies import table_pictures
from fxsparse.studies.execution import read_states
from fxsparse.studies.table import make_table
from fxsparse.studies.table_formats import About, to_csv, to_markdown

ROWS = ["dense", "static", {"method": "rigl", "label": "RigL"}, {"method": "set", "label": "SET|x"}]
# label, sparsity -> (accuracy by seed, training FLOPs)
RESULTS = {
    ("dense", None): ([0.95, 0.97], 1.0),
    ("static", 0.8): ([0.90, 0.92], 0.20),
    ("RigL", 0.8): ([0.93, 0.93], 0.25),
    ("SET|x", 0.8): ([0.91, 0.95], 0.20),
    ("static", 0.9): ([0.80, 0.84], 0.10),
    ("RigL", 0.9): ([0.86, 0.89], 0.125),
    ("SET|x", 0.9): ([0.83, 0.85], 0.10),
}
# Means 91, 93, 93 and 82, 87.5, 84; deviations sqrt(2)/2 of the difference: 1.41, 0, 2.83 and 2.83, 2.12, 1.41.
EXPECTED = """\
| method | accuracy, % at density 0.2 | FLOPs (train, test) | accuracy, % at density 0.1 | FLOPs (train, test) |
| :--- | ---: | ---: | ---: | ---: |
| *group 1* |  | *0.200x to 0.250x* |  | *0.100x to 0.125x* |
| static | 91.00 ± 1.41 (2) | 0.200x, 0.200x | 82.00 ± 2.83 (2) | 0.100x, 0.100x |
| RigL | **93.00 ± 0.00** (2) | 0.250x, 0.200x | **87.50 ± 2.12** (2) | 0.125x, 0.100x |
| SET\\|x | **93.00 ± 2.83** (2) | 0.200x, 0.200x | 84.00 ± 1.41 (2) | 0.100x, 0.100x |
| *group 2* |  | *1.000x* |  | *1.000x* |
| dense | 96.00 ± 1.41 (2) | 1.000x, 1.000x | 96.00 ± 1.41 (2) | 1.000x, 1.000x |
"""


@pytest.fixture
def fill(put_result):
    def fill(runs, results):
        seeds = sorted({run.seed for run in runs})
        for run in runs:
            scores, cost = results.get((run.row.label, run.sparsity), ([], 0))
            if seeds.index(run.seed) < len(scores):
                put_result(run, scores[seeds.index(run.seed)], cost)

    return fill


def written(comparison, runs, **about):
    table = make_table(runs, read_states(runs), comparison.group_factor)
    return to_markdown(table, About(comparison, runs, "fxsparse compare test.yaml", **about)), table


def lines_of(markdown):
    return {line.split("|")[1].strip(): line for line in markdown.splitlines() if line.startswith("|")}


def test_the_whole_table(planned, fill):
    comparison, runs = planned(methods=ROWS, sparsities=[0.8, 0.9], seeds=[3, 5], title="T", notes="N: small.")
    fill(runs, RESULTS)
    text, _ = written(comparison, runs, picture="t.png")
    assert text.startswith("# T\n\nN: small.\n\n" + EXPECTED)
    assert "(number of seeds, of 2: 3 5)" in text and "(2e+04 FLOPs an example)" in text
    assert "![accuracy against density and FLOPs](t.png)" in text
    assert "Model: small_resnet width=2; data: digits; length: 12 steps; batch: 16; optimizer: sgd" in text
    assert "device: cpu; versions: torch 9.9." in text
    assert text.endswith("Made by:\n\n    fxsparse compare test.yaml\n")
    assert written(comparison, runs, picture="t.png")[0] == text


def test_the_same_in_csv(planned, fill):
    comparison, runs = planned(methods=ROWS, sparsities=[0.8, 0.9], seeds=[3, 5])
    fill(runs, RESULTS)
    rows = list(csv.DictReader(io.StringIO(to_csv(written(comparison, runs)[1]))))
    assert len(rows) == 8
    (row,) = [row for row in rows if row["label"] == "RigL" and row["sparsity"] == "0.9"]
    assert (row["group"], row["method"], row["distribution"], row["n"], row["planned"]) == (
        "1",
        "rigl",
        "erk",
        "2",
        "2",
    )
    assert (row["mean"], row["std"]) == ("0.875", "0.02121320344")
    assert (row["training_flops"], row["inference_flops"], row["density"]) == ("0.125", "0.1", "0.1")
    assert (row["seeds"], row["scores"], row["failures"]) == ("3 5", "0.86 0.89", "")


def test_seeds_that_are_missing_failed_or_diverged_are_said(planned, fill):
    comparison, runs = planned(methods=ROWS, sparsities=[0.8], seeds=[0, 1, 2])
    fill(
        runs, {("static", 0.8): ([0.5], 0.2), ("dense", None): ([0.9, 0.8, 0.7], 1.0), ("RigL", 0.8): ([0.6, 0.8], 0.2)}
    )
    for run in runs:
        word = {("RigL", 2): "diverged", ("SET|x", 0): "failed", ("SET|x", 1): "failed"}.get((run.row.label, run.seed))
        if word is not None:
            run.folder.mkdir(parents=True)
            (run.folder / "error.json").write_text(json.dumps({"state": word, "message": "no luck"}))
    text, _ = written(comparison, runs, failures=["RigL, seed 2 diverged: no luck"])
    lines = lines_of(text)
    assert lines["static"] == "| static | 50.00 (1 of 3) | 0.200x, 0.200x |"
    assert lines["RigL"] == "| RigL | **70.00 ± 14.14** (2 of 3, 1 diverged) | 0.200x, 0.200x |"
    assert lines["SET\\"] == "| SET\\|x | 2 failed, 1 not run |  |"
    assert lines["dense"] == "| dense | 80.00 ± 10.00 (3) | 1.000x, 1.000x |"
    assert text.index("*no results*") > text.index("| dense")
    assert "Runs without a result:\n\n- RigL, seed 2 diverged: no luck\n" in text


def test_nothing_run_yet_is_a_table_too(planned, tmp_path):
    comparison, runs = planned(methods=ROWS)
    text, table = written(comparison, runs)
    assert all("not run" in lines_of(text)[name] for name in ("dense", "static", "RigL"))
    assert to_csv(table).count("\n") == 5


def test_a_group_never_spans_more_than_its_factor_in_any_column(planned, fill):
    # on average over the columns b costs 1.44 of a, but at 0.9 it costs 1.6
    rows = [{"method": "set", "label": name} for name in "cab"]
    costs = {("a", 0.8): 0.20, ("a", 0.9): 0.10, ("b", 0.8): 0.26, ("b", 0.9): 0.16, ("c", 0.8): 0.29, ("c", 0.9): 0.14}
    comparison, runs = planned(methods=rows, sparsities=[0.8, 0.9])
    fill(runs, {place: ([0.5], cost) for place, cost in costs.items()})
    table = written(comparison, runs)[1]
    assert [[line.label for line in group.lines] for group in table.groups] == [["c", "a"], ["b"]]
    table = make_table(runs, read_states(runs), 1.2)
    assert [[line.label for line in group.lines] for group in table.groups] == [["a"], ["c", "b"]]


def test_a_heading_of_ones_own(planned, fill):
    rows = ["static", {"method": "rigl", "group": "with help"}, {"method": "set", "group": "with help"}]
    comparison, runs = planned(methods=rows)
    fill(runs, {("static", 0.9): ([0.9], 0.1), ("rigl", 0.9): ([0.8], 0.1), ("set", 0.9): ([0.7], 5.0)})
    text = written(comparison, runs)[0]
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert names[2:] == ["*group 1*", "static", "*with help*", "rigl", "set"]
    assert "**80.00**" in text and "**90.00**" not in text


def test_several_distributions_are_told_apart_and_a_row_at_one_sparsity_leaves_the_other_empty(planned, fill):
    rows = ["static", {"method": "rigl", "sparsity": 0.8, "distribution": "uniform"}]
    comparison, runs = planned(methods=rows, sparsities=[0.8, 0.9], distributions=["uniform", "erk"])
    fill(runs, {("static", 0.8): ([0.5], 0.2), ("static", 0.9): ([0.4], 0.1), ("rigl", 0.8): ([0.6], 0.2)})
    lines = lines_of(written(comparison, runs)[0])
    assert {"static (uniform)", "static (ERK)", "rigl (uniform)"} < set(lines)
    assert lines["rigl (uniform)"] == "| rigl (uniform) | **60.00** (1) | 0.200x, 0.200x |  |  |"


def test_a_run_that_is_only_a_prerequisite_has_no_line(planned, fill):
    comparison, runs = planned(methods=["lottery"])
    fill(runs, {("pruning", 0.9): ([0.5], 0.5), ("lottery", 0.9): ([0.6], 0.6)})
    assert [run.row.label for run in runs] == ["pruning", "lottery"]
    assert [line.label for line in written(comparison, runs)[1].lines] == ["lottery"]


def test_fewer_bits_are_better(planned, put_result):
    comparison, runs = planned(methods=["static", "rigl"])
    bits = {"metric": "bits per character"}
    for run, loss in zip(runs, (1.0, 0.9), strict=True):
        put_result(run, 0.5, 0.1, test_loss=loss, **bits)
    text = written(comparison, runs)[0]
    assert "| bits per character at density 0.1 |" in text and "(lower is better)" in text
    assert "| static | 1.443 (1) |" in text and "| rigl | **1.298** (1) |" in text  # 1 / ln 2 and 0.9 / ln 2


def test_accuracies_and_bits_do_not_stand_in_one_table(planned, put_result):
    comparison, runs = planned(methods=["static", "rigl"])
    put_result(runs[0], 0.5, 0.1)
    put_result(runs[1], 0.5, 0.1, metric="bits per character")
    with pytest.raises(ConfigError, match="accuracy, bits per character"):
        written(comparison, runs)


def test_longer_runs_are_named(planned, put_result):
    rows = ["static", "set", {"method": "rigl", "extend": 2, "label": "RigL 2x"}]
    comparison, runs = planned(methods=rows)
    for run in runs:
        put_result(run, 0.5, 0.1, steps=24 if run.row.label == "RigL 2x" else 12)
    assert "length: 12 steps (RigL 2x: 24 steps);" in written(comparison, runs)[0]


def test_the_picture_shows_every_mean_with_its_spread(planned, monkeypatch, tmp_path, fill):
    figure_module = pytest.importorskip("matplotlib.figure")
    comparison, runs = planned(methods=ROWS, sparsities=[0.8, 0.9], seeds=[3, 5])
    fill(runs, RESULTS)
    table = written(comparison, runs)[1]
    assert table_pictures.draw_or_explain(table, tmp_path / "a.png") == f"picture: {tmp_path / 'a.png'}"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    figures = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda figure, path, **more: figures.append(figure))
    assert table_pictures.draw(table, "unused.png")
    left, right = figures[0].axes
    assert {text.get_text() for text in figures[0].legends[0].get_texts()} == {"static", "RigL", "SET|x", "dense"}
    (rigl,) = (bars for bars in right.containers if bars.get_label() == "RigL")
    points, _, (spreads,) = rigl.lines
    assert points.get_xydata().ravel() == pytest.approx([0.25, 93.0, 0.125, 87.5])
    assert sorted(spreads.get_segments()[1][:, 1]) == pytest.approx([87.5 - 2.1213, 87.5 + 2.1213], abs=1e-3)
    assert len(left.containers) == 3
    (dense,) = (line for line in left.lines if line.get_label() == "dense")
    assert list(dense.get_ydata()) == [96.0, 96.0]
