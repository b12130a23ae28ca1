"""How far the queue is, and what is left, from figures that can be worked out by hand."""

import json

import pytest

from fxsparse.reproduction import measure
from fxsparse.reproduction.measure import StepSeconds, Throughput
from fxsparse.reproduction.status import listed, read_status

CPU = "cpu, 1 threads"


@pytest.fixture
def place(somewhere, put_result, tiny):
    """One run finished at half a second a step, one begun at step 400 of 1,000, one that failed, two not run."""
    place = somewhere()
    put_result(place.results, tiny("static", steps=1000), 0.9)
    begun = place.out / "tiny-rigl-seed0"
    begun.mkdir(parents=True)
    begun.joinpath("timing.jsonl").write_text('{"step": 200, "seconds": 40.0}\n{"step": 400, "seconds": 100.0}\n')
    place.out.joinpath("tiny-set-seed0").mkdir()
    place.out.joinpath("tiny-set-seed0", "error.json").write_text(json.dumps({"state": "failed", "message": "no room"}))
    return place


@pytest.fixture
def queue(tiny):
    names = [("static", 0), ("RigL", 0), ("SET", 0), ("SNFS", 0), ("static", 1)]
    return [tiny(label, seed=seed, steps=1000) for label, seed in names]


def test_where_every_run_is(place, queue):
    status = read_status(queue, place, CPU)
    assert [each.word for each in status] == ["finished", "in progress", "failed", "not run", "not run"]
    assert [each.step for each in status] == [1000, 400, 0, 0, 0]
    assert [each.seconds for each in status] == [0.5, 0.3, None, None, 0.5]
    assert [each.seconds_left for each in status] == [0.0, pytest.approx(180), None, None, 500.0]
    assert status[0].note == "90.00% on cpu, 1 threads" and status[2].note == "no room"


def test_seconds_of_another_device_say_nothing(place, queue):
    status = read_status(queue, place, "NVIDIA H200")
    assert [each.seconds_left for each in status][2:] == [None, None, None]


def test_the_list(place, queue):
    measure.write_seconds(place.results, CPU, queue[0].config, [StepSeconds("SNFS", 2.0, None, 2.0, 20)])
    text = listed(read_status(queue, place, CPU), place, CPU)
    assert "5 runs: 1 finished, 1 failed, 1 in progress, 2 not run" in text
    assert "left on cpu, 1 threads: about 45 min of runs, one after the other" in text  # 180 + 500 + 2000 s
    assert "not known on cpu, 1 threads: the seconds of SET" in text
    measure.write_jobs(place.results, CPU, 4, [Throughput(4, 8.0)])
    assert "with 4 at a time about 11 min" in listed(read_status(queue, place, CPU), place, CPU)


def test_what_was_measured_alone_gives_way_to_runs(place, queue):
    rows = [StepSeconds("static", 9.0, None, 9.0, 20)]
    measure.write_seconds(place.results, CPU, queue[0].config, rows)
    assert read_status(queue, place, CPU)[4].seconds == 0.5


def test_a_run_twice_as_long_has_the_same_steps(place, tiny):
    measure.write_seconds(place.results, CPU, tiny().config, [StepSeconds("RigL", 0.5, None, 0.5, 20)])
    status = read_status([tiny("RigL 2x", seed=5, steps=1000)], place, CPU)[0]
    assert (status.seconds, status.seconds_left) == (0.5, 1000.0)


def test_a_damaged_state_file_is_a_failure(place, queue):
    place.states.mkdir()
    place.state_file(queue[3]).write_bytes(b"nothing")
    status = read_status(queue, place, CPU)[3]
    assert status.word == "failed" and "no state file" in status.note


def test_a_state_from_elsewhere(place, queue):
    place.states.mkdir()
    place.state_file(queue[3]).write_bytes(b'{"name": "tiny-snfs-seed0", "step": 70, "size": 0, "sha256": ""}\n')
    status = read_status(queue, place, CPU)[3]
    assert (status.word, status.step) == ("in progress", 70)
