"""`fxsparse tune`: searches that stop and go on, several processes in one study, and no look at the test part."""

import csv
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna")
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

from fxsparse.cli import main  # noqa: E402
from fxsparse.studies import search as search_module  # noqa: E402
from fxsparse.studies.search import Space, open_search, run_trials, validation_scores  # noqa: E402
from fxsparse.studies.search_report import best_row, draw_contour, to_csv, to_markdown, trial_rows  # noqa: E402
from fxsparse.training import TrainConfig  # noqa: E402
from fxsparse.training.objective import ACCURACY, BITS_PER_CHARACTER  # noqa: E402

SHORT = "tune --model-options width=2 --steps 6 --batch-size 16 --validation 100 --threads 1 --interval-range 1 4 1 "
SPACE = Space(update_interval=(1, 4, 1))
CONFIG = TrainConfig(
    model="small_resnet",
    model_options={"width": 2},
    steps=6,
    batch_size=16,
    validation=100,
    threads=1,
    plots=False,
    tensorboard=False,
).resolved()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def opened(out="out", config=CONFIG, space=SPACE, seeds=(0,), metric=ACCURACY, sampler_seed=0):
    return open_search(config, space, seeds, metric, Path(out), f"sqlite:///{out}/t.sqlite3", "s", sampler_seed)


@pytest.fixture
def no_training(monkeypatch):
    """Trials cost nothing: the score is a function of the options, best at alpha 0.5, delta_t 3; seeds add up."""

    def train_there(folder, config, progress):
        score = 1 - abs(config.drop_fraction - 0.5) - abs(config.update_interval - 3) / 10 + config.seed / 100
        folder.mkdir(parents=True)
        records = [
            {"kind": "eval", "split": "validation", "step": 3, "accuracy": 9.0, "bits_per_character": 9.0},
            {"kind": "eval", "split": "validation", "step": 6, "accuracy": score, "bits_per_character": score},
            {"kind": "eval", "split": "test", "step": 6, "accuracy": -score, "bits_per_character": -score},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / "result.json").write_text("{}")
        return search_module.RunState("finished")

    monkeypatch.setattr(search_module, "train_there", train_there)
    monkeypatch.setattr("fxsparse.studies.search_report.results", lambda search, trial: [])


def score_of(options, seed=0):
    return 1 - abs(options["drop_fraction"] - 0.5) - abs(options["update_interval"] - 3) / 10 + seed / 100


def params_of(search):
    return [trial.params for trial in search.study.get_trials()]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--validation 0", "validation is 0"),
        ("--trials 0", "--trials is 0"),
        ("--alpha-range 0.6 0.1", "--alpha-range 0.6 0.1"),
        ("--alpha-range 0.6 1.1", "[0, 1]"),
        ("--interval-range 0 5 1", "--interval-range 0 5 1"),
        ("--steps 40", "never rewires"),
        ("--lr-range 0.1 0.2", "--tune-lr"),
        ("--tune-lr --lr-range 0 0.2", "above 0"),
        ("--seeds 1 1", "--seeds"),
        ("--method static", "static has no drop fraction and no update interval"),
        ("--method snip", "snip has no drop fraction and no update interval"),
        ("--method deepr", "deepr has no drop fraction and no update interval"),
        ("--drop-fraction 0.2", "--drop-fraction"),
        ("--storage nonsense", "nonsense"),
        ("--storage nonsense://x", "nonsense"),
        ("--method rigle", "did you mean rigl"),
    ],
)
def test_a_mistake_is_one_line(flags, said, capsys):
    assert main(["tune", *flags.split()]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and err.startswith("fxsparse: error: ")


def test_without_optuna_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["tune"]) == 2
    assert capsys.readouterr().err == "fxsparse: error: fxsparse tune needs Optuna: pip install 'fxsparse[tune]'\n"


def test_the_ranges_are_the_reports_and_the_rate_is_logarithmic():
    found = Space(lr=(0.005, 0.1)).distributions()
    assert (found["drop_fraction"].low, found["drop_fraction"].high) == (0.1, 0.6)
    interval = found["update_interval"]
    assert (interval.low, interval.high, interval.step) == (50, 1000, 50)
    assert found["lr"].log and not found["drop_fraction"].log


def test_the_score_is_the_last_validation_record_a_mean_over_seeds(no_training):
    search = opened(seeds=(0, 4))
    run_trials(search, 3, say=lambda line: None)
    for trial in search.study.get_trials():
        assert trial.value == pytest.approx(score_of(trial.params) + 0.02)
        assert validation_scores(search, trial) == pytest.approx([score_of(trial.params), score_of(trial.params, 4)])
    rows = trial_rows(search)
    assert rows[0].spread == pytest.approx(0.04 / 2**0.5)


def test_it_searches(no_training):
    search = open_search(CONFIG, SPACE, (0,), ACCURACY, Path("out"), "sqlite://", "s")
    run_trials(search, 30, say=lambda line: None)
    early, late = ([score_of(params) for params in params_of(search)[part]] for part in (slice(0, 10), slice(20, 30)))
    assert sum(late) / 10 > sum(early) / 10 + 0.05
    assert search.study.best_params["update_interval"] == 3
    assert len({tuple(params.values()) for params in params_of(search)}) > 20


def test_fewer_bits_are_better(no_training):
    search = opened(metric=BITS_PER_CHARACTER)
    run_trials(search, 6, say=lambda line: None)
    scores = [score_of(params) for params in params_of(search)]
    rows = trial_rows(search)
    assert best_row(search, rows).number == search.study.best_trial.number == scores.index(min(scores))


def test_a_search_that_was_stopped_is_the_search_that_was_not(no_training):
    run_trials(opened("whole"), 12, say=lambda line: None)
    for count in (1, 5, 11, 12):
        run_trials(opened("parts"), count, say=lambda line: None)
    assert params_of(opened("parts")) == params_of(opened("whole"))
    run_trials(opened("other", sampler_seed=1), 2, say=lambda line: None)
    assert params_of(opened("other", sampler_seed=1)) != params_of(opened("whole"))[:2]


def test_a_study_of_something_else_is_refused(no_training):
    opened()
    with pytest.raises(search_module.ConfigError, match=r"the study s in .* has lr 0\.1 instead of 0\.2"):
        opened(config=dataclasses.replace(CONFIG, lr=0.2))
    with pytest.raises(search_module.ConfigError, match=r"seeds \[0\] instead of \[0, 1\]"):
        opened(seeds=(0, 1))
    with pytest.raises(search_module.ConfigError, match="space"):
        opened(space=Space())
    opened(config=dataclasses.replace(CONFIG, threads=2))


def test_a_trial_that_lost_its_process_is_taken_over_and_one_at_work_is_not(no_training):
    search = opened()
    with search_module.ExitStack() as claim:
        mine = search_module._next_trial(search, 9, claim)
        with search_module.ExitStack() as other:
            assert search_module._next_trial(opened(), 9, other).number == mine.number + 1
        with search_module.ExitStack() as other:  # the second one's process is gone
            assert search_module._next_trial(opened(), 9, other).number == mine.number + 1
        with search_module.ExitStack() as other:
            search_module._next_trial(opened(), 2, other)
            with search_module.ExitStack() as third:
                assert search_module._next_trial(opened(), 2, third) is None  # enough, and both are at work
    run_trials(search, 2, say=lambda line: None)
    assert [trial.state.name for trial in search.study.get_trials()] == ["COMPLETE"] * 2


def test_a_failed_trial_does_not_end_the_search(monkeypatch, no_training):
    train = search_module.train_there

    def sometimes(folder, config, progress):
        if "trial-0001" in folder.name:
            return search_module.RunState("diverged", error="too fast")
        return train(folder, config, progress)

    monkeypatch.setattr(search_module, "train_there", sometimes)
    lines = []
    search = opened()
    run_trials(search, 3, say=lines.append)
    assert [row.state for row in trial_rows(search)] == ["complete", "fail", "complete"]
    assert "diverged: too fast" in lines[1]
    assert "| 1 | " in to_markdown(search, trial_rows(search), "c") and ",fail\n" in to_csv(search, trial_rows(search))


def test_the_contour_is_drawn_over_what_was_tried(no_training, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    search = opened()
    run_trials(search, 3, say=lambda line: None)
    assert not draw_contour(search, trial_rows(search), "three.png")
    run_trials(search, 8, say=lambda line: None)
    rows = trial_rows(search)
    assert draw_contour(search, rows, "eight.png") and Path("eight.png").read_bytes().startswith(b"\x89PNG")
    figures = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda figure, path, **more: figures.append(figure))
    draw_contour(search, rows, "unused.png")
    axes = figures[0].axes[0]
    points, star = axes.collections[-2:]
    assert points.get_offsets().tolist() == [
        [row.options["drop_fraction"], row.options["update_interval"]] for row in rows
    ]
    best = max(rows, key=lambda row: score_of(row.options))
    assert star.get_offsets().tolist() == [[best.options["drop_fraction"], best.options["update_interval"]]]


def test_the_command_interrupted_and_continued(capsys):
    made = []

    def interrupt_later(*arguments):
        made.append(1)
        if len(made) == 9:
            os.kill(os.getpid(), signal.SIGINT)

    command = [*SHORT.split(), "--trials", "3", "--out", "t"]
    handle = register_optimizer_step_post_hook(interrupt_later)
    try:
        assert main(command) == 130
        assert "interrupted; the same command goes on" in capsys.readouterr().err
        assert main(command) == 0
    finally:
        handle.remove()
    assert len(made) == 18  # three trials of six steps, none of them twice
    out = capsys.readouterr().out
    rows = list(csv.DictReader(Path("t/trials.csv").read_text().splitlines()))
    assert [row["state"] for row in rows] == ["complete"] * 3
    best = max(rows, key=lambda row: float(row["score"]))
    assert f"best: trial {best['trial']}, validation accuracy {float(best['score']):.4f}" in out
    assert f"| **{best['trial']}** |" in Path("t/trials.md").read_text()
    config = json.loads(Path("t/trials/trial-0001-seed0/config.json").read_text())
    assert config["validation"] == 100 and str(config["update_interval"]) == rows[1]["update_interval"]
    text = Path("t/trials.md").read_text()
    assert (
        "fxsparse tune --model-options width=2 --validation 100 --batch-size 16 --steps 6" in text
        or "--steps 6" in text
    )


def test_a_tenth_is_held_out_where_nothing_is_said():
    command = SHORT.replace("--validation 100 ", "").split()
    assert main([*command, "--trials", "1", "--out", "t"]) == 0
    config = json.loads(Path("t/trials/trial-0000-seed0/config.json").read_text())
    assert config["validation"] == 144  # of 1,437
