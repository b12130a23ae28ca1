"""The page: published beside measured, worked out by hand, and never more than the files say."""

import re

import pytest

from fxsparse.reproduction import measure, page
from fxsparse.reproduction.measure import StepSeconds
from fxsparse.reproduction.queue import METHODS_TIMED, Recipe, full_queue, scaled_queue

QUEUE = {run.name: run for run in full_queue()}


def seeds(name):
    return [QUEUE[f"45k-{name}-seed{seed}"] for seed in range(3)]


@pytest.fixture
def written(somewhere, tmp_path):
    """Writes the page of what lies in the results: its text and what was said."""

    def write():
        lines = page.write(tmp_path / "docs" / "tables.md", somewhere())
        return (tmp_path / "docs" / "tables.md").read_text(), lines

    return write


def row_of(text, method, distribution, density):
    """The cells of a row, the first of that name."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[:3] == [method, distribution, density]:
            return cells[3:]
    raise AssertionError(f"no row {method} {distribution} {density}")


def test_without_a_run(written):
    text, _ = written()
    rows = [line for line in text.splitlines() if re.match(r"\| .*\((Table [125]|supplement)\)", line)]
    assert len(rows) == 41 and all("not run" in row for row in rows)
    assert "No full-size run has finished yet" in text and ".png" not in text
    assert row_of(text, "RigL", "ERK", "0.1")[:2] == ["92.4 ± 0.06 (Table 2)", "not run"]


def test_three_seeds_are_judged(written, somewhere, put_result):
    pytest.importorskip("matplotlib")
    for run, accuracy in zip(seeds("rigl-erk-0.1"), (0.920, 0.924, 0.931), strict=True):
        put_result(somewhere().results, run, accuracy)
    for run, accuracy in zip(seeds("set-erk-0.1"), (0.918, 0.9185, 0.919), strict=True):
        put_result(somewhere().results, run, accuracy)
    for run, accuracy in zip(seeds("set-uniform-0.1"), (0.916, 0.916, 0.916), strict=True):
        put_result(somewhere().results, run, accuracy)
    text, lines = written()
    nesterov = "Nesterov, 0.3"
    # 92.5 with deviations -0.5, -0.1, 0.6: variance 0.62 / 2
    expected = ["92.4 ± 0.06 (Table 2)", "92.50 ± 0.56 (3)", "+0.10", "yes", "0.300x, 0.200x", nesterov]
    assert row_of(text, "RigL", "ERK", "0.1") == expected
    assert row_of(text, "SET", "ERK", "0.1")[1:4] == ["91.85 ± 0.05 (3)", "-0.35", "no"]
    assert row_of(text, "SET", "uniform", "0.1")[1:4] == ["91.60 ± 0.00 (3)", "+0.30", "yes"]  # 0.300...01 in floats
    assert "9 full-size runs have finished" in text
    assert "picture: " in " ".join(lines) and "](tables-45k.png)" in text and "tables-50k" not in text


def test_fewer_seeds_are_not(written, somewhere, put_result):
    put_result(somewhere().results, seeds("rigl-erk-0.1")[0], 0.5)
    put_result(somewhere().results, seeds("static-erk-0.1")[1], 0.5)
    text, _ = written()
    assert row_of(text, "RigL", "ERK", "0.1")[1:4] == ["50.00 (1)", "-42.40", "1 of 3 seeds"]
    assert row_of(text, "static", "ERK", "0.1")[:4] == ["-", "50.00 (1)", "", "1 of 3 seeds"]


def test_a_run_that_diverged_is_told(written, somewhere, put_result):
    put_result(somewhere().results, seeds("rigl-erk-0.1")[1], reason="the loss is no longer finite at step 7")
    text, _ = written()
    assert row_of(text, "RigL", "ERK", "0.1")[1:4] == ["not run", "", "1 of 3 seeds diverged"]
    assert "- 45k-rigl-erk-0.1-seed1 diverged at step 7: the loss is no longer finite at step 7." in text


def test_another_recipe_has_tables_of_its_own(written, somewhere, put_result):
    other = full_queue(Recipe(nesterov=False, dropout=0.0))[3]
    put_result(somewhere().results, other, 0.9)
    text, _ = written()
    assert row_of(text, "RigL", "ERK", "0.1")[1] == "not run"
    section = text.partition("supplement, with ordinary, 0\n")[2]
    assert row_of(section, "RigL", "ERK", "0.1")[1:] == [
        "90.00 (1)",
        "-2.40",
        "1 of 3 seeds",
        "0.300x, 0.200x",
        "ordinary, 0",
    ]


def test_scaled_runs_stand_apart(written, somewhere, put_result):
    for run in scaled_queue():
        put_result(somewhere().results, run, 0.5 + run.seed / 100)
    text, _ = written()
    full, heading, small = text.partition("## Scaled down: proves the harness, says nothing of the tables")
    assert heading and "51.0" not in full and "No full-size run has finished yet" in full
    small = small.partition("\n## ")[0]
    assert small.count("51.00 ± 1.00 (3)") == 4 and "12 of 12 runs have finished" in small
    assert "not comparable" in small and not re.search(r"9\d\.\d", small)


def test_what_does_not_belong_is_left_out_with_a_line(written, somewhere, put_result, tiny):
    results = somewhere().results
    put_result(results, tiny(), 0.5)
    put_result(results, tiny(seed=1, stop_fraction=0.0), 0.5)
    changed = QUEUE["45k-rigl-erk-0.1-seed0"]
    path = put_result(results, changed, 0.924)
    path.write_text(path.read_text().replace('"lr": 0.1', '"lr": 0.3'))
    (results / "notes.json").write_text("{}")
    text, lines = written()
    assert row_of(text, "RigL", "ERK", "0.1")[1] == "not run"
    assert any("notes.json is no result of a run; left out" in line for line in lines)
    assert any("tiny-static-seed0.json is in no table; left out" in line for line in lines)
    assert any("tiny-static-seed1.json is in no table (stop_step is 0" in line for line in lines)
    assert any("45k-rigl-erk-0.1-seed0.json was made with lr 0.3 instead of 0.1; left out" in line for line in lines)


def test_what_the_full_tables_need(written, somewhere):
    rows = [StepSeconds(label, 0.5, None, 0.5, 20) for label in METHODS_TIMED]
    somewhere().results.mkdir(parents=True)
    measure.write_seconds(somewhere().results, "cpu, 1 threads", next(iter(QUEUE.values())).config, rows)
    text, _ = written()
    # 45,000 images: 29 accuracies and 4 of twice the steps; 50,000 images: 10
    steps = 3 * ((29 + 2 * 4) * 87_890 + 10 * 97_656)
    assert f"{steps:,} optimizer steps" in text
    assert f"all 129 runs take {steps * 0.5 / 86_400:.1f} days" in text
    assert "49 hours" in text  # the first four: 4 * 87,890 * 0.5 s


def test_the_same_files_give_the_same_page(written, somewhere, put_result):
    put_result(somewhere().results, seeds("rigl-erk-0.1")[0], 0.9)
    assert written() == written()
