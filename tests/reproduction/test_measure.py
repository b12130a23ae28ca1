"""What is measured: the steps that count, and how many runs at a time are chosen."""

import json
import time

import pytest
import torch

from fxsparse.core.errors import ConfigError, FxSparseError
from fxsparse.reproduction import measure
from fxsparse.reproduction.measure import StepSeconds, Throughput, find_jobs, time_steps


class Clock:
    """Stands still until it is told."""

    now = 0.0

    @classmethod
    def perf_counter(cls):
        return cls.now

    process_time = perf_counter


@pytest.fixture
def slow_steps(monkeypatch):
    """A step takes 1 s, one that rewires 11 s, and each of the first three 100 s more: the machine was busy."""
    made = []
    whole = measure.build

    def build(config):
        parts = whole(config)
        whole_step = parts.train_step

        def train_step(inputs, targets, step):
            before = parts.rewirer.update_count
            outcome = whole_step(inputs, targets, step)
            made.append(step)
            Clock.now += 11 if parts.rewirer.update_count > before else 1
            Clock.now += 100 if len(made) <= 3 else 0
            return outcome

        parts.train_step = train_step
        return parts

    Clock.now = 0.0
    monkeypatch.setattr(measure, "build", build)
    monkeypatch.setattr(measure, "time", Clock)
    return made


def test_steps_that_rewire_are_told_apart_and_a_busy_machine_does_not_count(tiny, slow_steps):
    row = time_steps("RigL", tiny("RigL", update_interval=100, steps=1000).config, 7)
    assert slow_steps == list(range(7))
    assert row == StepSeconds("RigL", 1.0, 11.0, pytest.approx((99 * 1 + 11) / 100), 7)


def test_on_one_thread_other_work_does_not_count():
    cpu, before = torch.device("cpu"), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert measure.clock_of(cpu) is time.process_time
        torch.set_num_threads(2)
        assert measure.clock_of(cpu) is time.perf_counter
    finally:
        torch.set_num_threads(before)
    assert measure.clock_of(torch.device("cuda")) is time.perf_counter


def test_a_method_that_never_rewires(tiny, slow_steps):
    row = time_steps("static", tiny("static", steps=1000).config, 5)
    assert (row.ordinary, row.update, row.mean) == (1.0, None, 1.0)


@pytest.mark.parametrize(
    ("rates", "chosen", "tried"),
    [
        ([10, 19, 20], 2, 3),  # four at a time are not worth it
        ([10, 10.5], 1, 2),
        ([10, 20, 40, 80, 160], 16, 5),
        ([10, 19, None], 2, 3),  # out of memory
    ],
)
def test_as_many_as_raise_the_throughput(tiny, monkeypatch, rates, chosen, tried):
    def together(config, count, seconds):
        rate = rates[measure.COUNTS.index(count)]
        return Throughput(count, rate, "" if rate else "out of memory")

    monkeypatch.setattr(measure, "measure_together", together)
    lines = []
    best, found = find_jobs(tiny().config, say=lines.append)
    assert (best, len(found), len(lines)) == (chosen, tried, tried)
    assert lines[0] == "1 at a time: 10.0 steps a second"


def test_not_even_one(tiny, monkeypatch):
    monkeypatch.setattr(measure, "measure_together", lambda *given: Throughput(1, None, "out of memory"))
    with pytest.raises(FxSparseError, match="could not train 1 at a time: out of memory"):
        find_jobs(tiny().config, say=lambda line: None)


@pytest.mark.slow
def test_two_processes_train_together_and_a_failure_is_told(tiny):
    found = measure.measure_together(tiny(steps=100_000).config, 2, 0.5)
    assert found.count == 2 and found.steps_a_second > 2
    failed = measure.measure_together(tiny(exclude=("nosuch.weight",)).config, 2, 0.5)
    assert failed.steps_a_second is None and "nosuch.weight" in failed.problem


def test_there_and_back(tiny, tmp_path):
    rows = [StepSeconds("RigL", 1.0, 2.0, 1.01, 20), StepSeconds("static", 0.5, None, 0.5, 20)]
    path = measure.write_seconds(tmp_path, "cpu, 1 threads", tiny().config, rows)
    assert path.name == "seconds-cpu-1-threads.json" and measure.read_seconds(tmp_path) == {"cpu, 1 threads": rows}
    tried = [Throughput(1, 9.0), Throughput(2, None, "out of memory")]
    path = measure.write_jobs(tmp_path, "NVIDIA H200", 1, tried)
    assert path.name == "jobs-nvidia-h200.json" and measure.read_jobs(tmp_path) == {"NVIDIA H200": (1, tried)}
    path.write_text(json.dumps({"kind": measure.JOBS_KIND}))
    with pytest.raises(ConfigError, match=r"jobs-nvidia-h200\.json is damaged"):
        measure.read_jobs(tmp_path)
