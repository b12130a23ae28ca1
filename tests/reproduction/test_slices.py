"""Slices of a queue: stopped and gone on elsewhere with the same bits, and everything that can go wrong."""

import errno
import json
import os
import re
import signal

import pytest

from fxsparse.core.errors import CheckpointError, ConfigError
from fxsparse.reproduction import slices
from fxsparse.reproduction.results import read_result
from fxsparse.reproduction.slices import work
from fxsparse.training import checkpoint
from fxsparse.training.locks import held


def do(queue, place, **how):
    lines = []
    complete = work(queue, place, say=lines.append, **how)
    return complete, lines


def result_without_seconds(path):
    content = json.loads(path.read_text())
    del content["result"]["seconds"]
    return content


def test_interrupted_and_gone_on_elsewhere_is_the_run_that_was_not(somewhere, steps_made, assert_same, tiny):
    network = {"model": "wide_resnet22_2", "model_options": {"width": 0.1, "dropout": 0.3}}  # draws random numbers
    queue = [tiny("static"), tiny("RigL", **network)]
    whole, first, second = somewhere("whole"), somewhere("first"), somewhere("second")
    assert do(queue, whole)[0] and steps_made.count == 20

    steps_made.count = 0
    steps_made.then = lambda count: os.kill(os.getpid(), signal.SIGINT) if count == 16 else None
    with pytest.raises(KeyboardInterrupt):
        do(queue, first)
    assert [path.name for path in first.states.iterdir()] == ["tiny-rigl-seed0.state"]
    assert [path.name for path in first.results.iterdir()] == ["tiny-static-seed0.json"]

    second.out.mkdir(parents=True)
    first.states.rename(second.states)  # all that another machine gets
    first.results.rename(second.results)
    steps_made.then = lambda count: None
    complete, lines = do(queue, second)
    assert complete and steps_made.count == 20 and "tiny-rigl-seed0: goes on from step 6 of 10" in lines
    assert list(second.states.iterdir()) == []
    for run in queue:
        name = f"{run.name}.json"
        assert result_without_seconds(second.results / name) == result_without_seconds(whole.results / name)
    payloads = [checkpoint.load(place.run_folder(queue[1]).checkpoints()[0]) for place in (second, whole)]
    for payload in payloads:
        del payload["seconds"]
    assert_same(*payloads)
    assert do(queue, second)[0] and steps_made.count == 20


def test_a_result_says_what_was_run(somewhere, tiny):
    run, place = tiny("RigL", seed=3), somewhere()
    do([run], place)
    path = place.results / "tiny-rigl-seed3.json"
    content = json.loads(path.read_text())
    assert content["seed"] == content["config"]["seed"] == 3 and content["config"]["steps"] == 10
    assert set(content["versions"]) == {"fxsparse", "torch", "python"} and content["device"].startswith("cpu, ")
    assert [step for step, _, _ in content["curve"]] == [5, 10]
    result = content["result"]
    assert content["curve"][-1][2] == result["test_accuracy"] and 0.85 < result["sparsity"] < 0.95
    assert 0 < result["training_flops"] < 1 and 0 < result["inference_flops"] < 1
    text = path.read_text()
    assert str(place.out) not in text and "data_root" not in text  # nothing of this machine
    assert len(text) < 10_000 and read_result(path).config == run.config


def test_the_time_is_up(somewhere, tiny, steps_made, monkeypatch):
    class Timer:
        """Rings after the fifth step."""

        def __init__(self, seconds, ring):
            assert seconds == 120
            steps_made.then = lambda count: ring() if count == 5 else None

        def start(self):
            pass

        def cancel(self):
            pass

    monkeypatch.setattr("fxsparse.studies.stopping.threading.Timer", Timer)
    place = somewhere()
    complete, _ = do([tiny(), tiny("SET")], place, minutes=2)
    assert not complete and [path.name for path in place.states.iterdir()] == ["tiny-static-seed0.state"]
    assert list(place.results.iterdir()) == [] and steps_made.count == 5


def test_long_work_is_told_now_and_then(somewhere, tiny, steps_made, monkeypatch):
    monkeypatch.setattr(slices, "TOLD_EVERY", 0.02)
    lines = []
    steps_made.then = lambda count: os.kill(os.getpid(), signal.SIGINT) if len(lines) > 3 else None
    with pytest.raises(KeyboardInterrupt):
        work([tiny(steps=1_000_000)], somewhere(), say=lines.append)
    steps = [
        int(step.replace(",", "")) for line in lines for step in re.findall(r"at step ([\d,]+) of 1,000,000", line)
    ]
    assert len(steps) > 1 and steps == sorted(set(steps))


def test_a_run_that_diverges_is_recorded_once(somewhere, steps_made, tiny):
    place, queue = somewhere(), [tiny(lr=1e12), tiny("SET")]
    assert do(queue, place)[0]
    content = json.loads((place.results / "tiny-static-seed0.json").read_text())
    assert content["state"] == "diverged" and "no longer finite" in content["reason"] and "result" not in content
    assert str(place.out) not in json.dumps(content) and "checkpoint" not in content["reason"]
    assert (place.results / "tiny-set-seed0.json").exists() and not list(place.states.iterdir())
    made = steps_made.count
    assert do(queue, place)[0] and steps_made.count == made
    elsewhere = somewhere("b")
    elsewhere.out.mkdir(parents=True)
    place.results.rename(elsewhere.results)
    assert do(queue, elsewhere)[0] and steps_made.count == made


def test_one_process_at_a_time(somewhere, steps_made, tiny):
    place = somewhere()
    with held(place.out / ".lock"), pytest.raises(ConfigError, match="another process is at work in"):
        do([tiny()], place)
    assert steps_made.count == 0 and do([tiny()], place)[0]


def test_a_damaged_state_stops_before_anything_is_trained(somewhere, steps_made, tiny):
    place, queue = somewhere(), [tiny(), tiny("RigL")]
    place.states.mkdir(parents=True)
    place.state_file(queue[1]).write_bytes(b'{"name": "tiny-rigl-seed0", "step": 4, "size": 9, "sha256": ""}\nhalf')
    with pytest.raises(CheckpointError, match=r"tiny-rigl-seed0\.state is truncated"):
        do(queue, place)
    assert steps_made.count == 0


def test_the_state_of_another_run_is_refused(somewhere, tiny):
    place, other = somewhere(), somewhere("b")
    with pytest.raises(KeyboardInterrupt):
        interrupt_at(3, tiny(lr=0.01), place)
    other.out.mkdir(parents=True)
    place.states.rename(other.states)
    with pytest.raises(ConfigError, match=r"state of a run with lr 0\.01 instead of 0\.1"):
        do([tiny()], other)


def interrupt_at(step, run, place):
    from torch.optim.optimizer import register_optimizer_step_post_hook

    made = []

    def count(*arguments):
        made.append(1)
        if len(made) == step:
            os.kill(os.getpid(), signal.SIGINT)

    handle = register_optimizer_step_post_hook(count)
    try:
        do([run], place)
    finally:
        handle.remove()


def test_what_else_lies_among_the_results(somewhere, tiny):
    place, run = somewhere(), tiny()
    place.results.mkdir(parents=True)
    (place.results / "package.json").write_text('{"name": "left-pad"}')
    (place.results / "half.json").write_text('{"kind": "reprod')
    (place.results / "list.json").write_text("[1, 2]")
    (place.results / f"{run.name}.json").write_text('{"kind": "reproduction run", "format": 1}')
    complete, lines = do([run], place)
    assert complete and all("\n" not in line for line in lines)
    for name in ("package.json", "half.json", "list.json", f"{run.name}.json"):
        assert sum(name in line and "left out" in line for line in lines) == 1
    assert read_result(place.results / f"{run.name}.json").state == "finished"  # the damaged one is made again
    assert (place.results / "package.json").read_text() == '{"name": "left-pad"}'


def test_a_result_of_other_options_stops_everything(somewhere, steps_made, tiny, put_result):
    place = somewhere()
    put_result(place.results, tiny(lr=0.25), 0.5)
    with pytest.raises(ConfigError, match=r"tiny-static-seed0\.json was made with lr 0\.25 instead of 0\.1"):
        do([tiny()], place)
    assert steps_made.count == 0


def test_killed_before_the_result_was_written(somewhere, steps_made, tiny):
    place = somewhere()
    do([tiny()], place)
    path = place.results / "tiny-static-seed0.json"
    before = path.read_text()
    path.unlink()
    do([tiny()], place)
    assert path.read_text() == before and steps_made.count == 10


def test_a_full_disk_stops_at_the_first_run(somewhere, steps_made, monkeypatch, tiny):
    place = somewhere()
    whole = checkpoint.os.fsync

    def full(descriptor):
        if steps_made.count >= 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"could not write .*: No space left on device"):
        do([tiny(), tiny("RigL"), tiny("SET")], place)
    assert steps_made.count < 10 and not (place.out / "tiny-rigl-seed0").exists()  # the second was not tried
    steps_made.count = 0
    monkeypatch.setattr(checkpoint.os, "fsync", whole)
    assert do([tiny()], place)[0] and steps_made.count == 6  # on from the checkpoint at step 4


def test_a_folder_that_cannot_be_written(somewhere, steps_made, tiny):
    place = somewhere()
    place.results.parent.mkdir(parents=True)
    place.results.write_text("a file")
    with pytest.raises(CheckpointError, match=r"could not write to .*results"):
        do([tiny()], place)
    assert steps_made.count == 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_two_at_a_time(somewhere, tiny):
    queue = [tiny("static"), tiny("RigL")]
    alone, together = somewhere("alone"), somewhere("together")
    do(queue, alone)
    assert do(queue, together, jobs=2)[0]
    for run in queue:
        one, other = (result_without_seconds(place.results / f"{run.name}.json") for place in (alone, together))
        assert (one.pop("at_a_time"), other.pop("at_a_time")) == (1, 2)
        assert one == other
