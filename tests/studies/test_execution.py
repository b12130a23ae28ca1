"""Doing a plan: nothing twice, on from checkpoints, failures aside, stopping in good order."""

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
import time

import pytest
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxsparse.core.errors import CheckpointError, ConfigError, DataError
from fxsparse.studies.execution import execute, read_states
from fxsparse.studies.stopping import stopped_after
from fxsparse.training.metrics import read_metrics

NEVER = {"method": "rigl", "label": "never", "exclude": ["nosuch.weight"]}  # refused when it is built
BURSTS = {"method": "rigl", "label": "bursts", "lr": 1e12, "optimizer": "sgd"}  # diverges


@pytest.fixture
def steps_made():
    """How many optimizer steps the test has made, and what is called after each."""

    class Steps:
        count = 0
        then = staticmethod(lambda count: None)

    def after_step(*arguments):
        Steps.count += 1
        Steps.then(Steps.count)

    handle = register_optimizer_step_post_hook(after_step)
    yield Steps
    handle.remove()


def do(runs, **how):
    lines = []
    complete = execute(runs, progress=False, say=lines.append, **how)
    return complete, lines


def words(runs):
    return [state.word for state in read_states(runs).values()]


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_ctrl_c_in_the_second_run_and_on_with_the_same_bits(planned, steps_made, tmp_path):
    _, runs = planned(methods=["static", "rigl", "set"])
    assert do(runs)[0] and steps_made.count == 36
    whole = {run.folder.name: read_metrics(run.folder / "metrics.jsonl") for run in runs}

    runs = [dataclasses.replace(run, folder=tmp_path / "again" / run.folder.name) for run in runs]
    steps_made.count = 0
    steps_made.then = lambda count: os.kill(os.getpid(), signal.SIGINT) if count == 19 else None
    with pytest.raises(KeyboardInterrupt):
        do(runs)
    states = list(read_states(runs).values())
    assert [state.word for state in states] == ["finished", "interrupted", "not run"]
    assert (states[1].step, steps_made.count) == (7, 19)
    first = files_of(runs[0].folder)

    complete, lines = do(runs)
    assert complete and words(runs) == ["finished"] * 3
    assert steps_made.count == 36  # 5 steps of the second, 12 of the third: none was made twice
    assert lines[0] == "3 runs, 2 to do" and lines[1].startswith("[2/3] rigl, sparsity 0.9, erk, seed 0: accuracy ")
    assert files_of(runs[0].folder) == first
    assert {run.folder.name: read_metrics(run.folder / "metrics.jsonl") for run in runs} == whole
    assert do(runs) == (True, ["3 runs, 0 to do"]) and steps_made.count == 36


def test_a_changed_option_is_named_before_anything_is_trained(planned, steps_made):
    _, runs = planned(methods=["static", "rigl"])
    do(runs[1:])
    _, changed = planned(methods=["static", {"method": "rigl", "lr": 0.25, "decay": "linear", "label": "rigl"}])
    steps_made.count = 0
    with pytest.raises(
        ConfigError, match=r"rigl-0\.9-erk-seed0 holds a run with decay cosine instead of linear; lr 0\.1"
    ):
        do(changed)
    assert steps_made.count == 0 and not changed[0].folder.exists()


def test_what_a_result_does_not_depend_on_may_change(planned, put_result):
    _, runs = planned(methods=["static"])
    put_result(runs[0], 0.5, 0.1)
    config = dataclasses.replace(runs[0].config, threads=2, checkpoint_interval=5, tensorboard=True)
    assert words([dataclasses.replace(runs[0], config=config)]) == ["finished"]


def test_a_damaged_result_is_named(planned, put_result):
    _, runs = planned(methods=["static"])
    put_result(runs[0], 0.5, 0.1)
    (runs[0].folder / "result.json").write_text('{"method": ')
    with pytest.raises(CheckpointError, match=r"result\.json"):
        read_states(runs)


def test_failures_are_noted_the_others_go_on_and_only_divergence_is_final(planned, steps_made):
    needs = {"method": "rigl", "label": "needy", "weights_from": {"label": "never"}}
    _, runs = planned(methods=[NEVER, needs, BURSTS, "static"])
    complete, lines = do(runs)
    assert complete and words(runs) == ["failed", "failed", "diverged", "finished"]
    assert "never, sparsity 0.9, erk, seed 0: failed: " in lines[1] and "nosuch.weight" in lines[1]
    assert lines[2].endswith("needs never-0.9-erk-seed0, which failed") and lines[2].startswith("[2/4]")
    assert "diverged: the loss is no longer finite" in lines[3] and lines[4].startswith("[4/4] static")
    assert all("\n" not in line for line in lines)
    assert read_states(runs)[runs[0].folder].error in lines[1]

    steps_made.count = 0
    complete, lines = do(runs)
    assert steps_made.count == 0 and lines[0] == "4 runs, 2 to do"
    assert [line.split(":")[1] for line in lines[1:]] == [" failed", " failed"]


def test_a_defect_is_a_failure_with_its_traceback_kept(planned, monkeypatch):
    _, runs = planned(methods=["static", "set"])
    ordinary = json.loads

    def broken(config, *arguments, **more):
        if config.method == "static":
            raise RuntimeError("out of\nmemory")
        raise KeyboardInterrupt

    monkeypatch.setattr("fxsparse.studies.run_state.train", broken)
    with pytest.raises(KeyboardInterrupt):
        do(runs)
    noted = ordinary((runs[0].folder / "error.json").read_text())
    assert noted["message"] == "RuntimeError: out of memory" and "in broken" in noted["traceback"]
    assert words(runs) == ["failed", "not run"]


def test_missing_data_stops_everything(planned, tmp_path):
    options = {"data": f"imagefolder:{tmp_path / 'nowhere'}", "steps": 2, "model": "resnet18"}
    _, runs = planned(methods=["static", "rigl"], options=options)
    with pytest.raises(DataError, match="nowhere"):
        do(runs)
    assert words(runs) == ["not run", "not run"]


def test_the_time_limit_saves_and_says_so(planned, steps_made, monkeypatch):
    asked = []

    class Timer:
        def __init__(self, seconds, ring):
            asked.append(seconds)
            steps_made.then = lambda count: ring() if count == 15 else None

        def start(self):
            asked.append("started")

        def cancel(self):
            asked.append("cancelled")

    monkeypatch.setattr("fxsparse.studies.stopping.threading.Timer", Timer)
    _, runs = planned(methods=["static", "rigl", "set"])
    before = signal.getsignal(signal.SIGTERM)
    complete, _ = do(runs, limit_minutes=0.5)
    assert not complete and asked == [30, "started", "cancelled"]
    states = list(read_states(runs).values())
    assert [(state.word, state.step) for state in states] == [("finished", 0), ("interrupted", 3), ("not run", 0)]
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_clock_runs_out():
    with pytest.raises(KeyboardInterrupt), stopped_after(0.001) as limit:
        time.sleep(30)
    assert limit.passed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_two_processes_give_the_same_results_and_report_failures(planned, tmp_path):
    needs = {"method": "rigl", "label": "needy", "weights_from": {"label": "static"}}
    _, runs = planned(methods=["static", needs, NEVER, BURSTS])
    complete, lines = do(runs, jobs=2)
    assert complete and words(runs) == ["finished", "finished", "failed", "diverged"]
    assert len(lines) == 5 and sum("nosuch.weight" in line for line in lines) == 1
    alone = [dataclasses.replace(run, folder=tmp_path / "alone" / run.folder.name) for run in runs[:1]]
    do(alone)
    assert read_metrics(alone[0].folder / "metrics.jsonl") == read_metrics(runs[0].folder / "metrics.jsonl")
    assert not (runs[2].folder / "config.json").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_processes_are_stopped_saved_and_a_killed_one_is_noted(planned):
    options = {"data": "digits", "model": "small_resnet", "model_options": {"width": 2}, "steps": 1_000_000}
    _, runs = planned(methods=["static", "rigl"], options=options | {"threads": 1, "log_interval": 1})

    def kill_one_then_interrupt():
        try:
            wait_for(lambda: all((run.folder / "metrics.jsonl").exists() for run in runs))
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            wait_for(lambda: any((run.folder / "error.json").exists() for run in runs), seconds=20)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=kill_one_then_interrupt, daemon=True)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        do(runs, jobs=2)
    watcher.join()
    states = sorted(read_states(runs).values(), key=lambda state: state.word)
    assert [state.word for state in states] == ["failed", "interrupted"]
    assert states[0].error == "its process died (killed by signal 9)" and states[1].step > 0
    assert not multiprocessing.active_children()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()
