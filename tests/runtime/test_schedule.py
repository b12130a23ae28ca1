"""When and how much: the paper's schedule by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxsparse import ConfigError
from fxsparse.core.masking import floor_count
from fxsparse.runtime.schedule import FirstSteps, PruningSchedule, UpdateSchedule, gradual_sparsity


def test_update_steps_by_hand():
    schedule = UpdateSchedule(interval=100, t_end=750.0, drop_fraction=0.3)
    assert [t for t in range(1001) if schedule.is_update_step(t)] == [100, 200, 300, 400, 500, 600, 700]
    # The end is exclusive, and the very first step never rewires.
    assert [t for t in range(20) if UpdateSchedule(5, 10.0, 0.3).is_update_step(t)] == [5]
    assert not any(UpdateSchedule(1, 0.0, 0.3).is_update_step(t) for t in range(5))


def test_cosine_by_hand():
    # alpha = 0.5, t_end = 10: 0.25 (1 + cos(pi / 5)) = 0.452254, 0.25 (1 + cos(2 pi / 5)) = 0.327254.
    schedule = UpdateSchedule(1, 10.0, 0.5)
    assert schedule.fraction(0) == 0.5
    assert schedule.fraction(2) == pytest.approx(0.452254, abs=1e-6)
    assert schedule.fraction(4) == pytest.approx(0.327254, abs=1e-6)
    assert schedule.fraction(5) == pytest.approx(0.25)
    assert UpdateSchedule(1, 10.0, 0.5, "linear").fraction(4) == pytest.approx(0.3)
    assert UpdateSchedule(1, 10.0, 0.5, "constant").fraction(4) == 0.5


def test_k_is_the_floor():
    schedule = UpdateSchedule(1, 10.0, 0.5)
    assert floor_count(schedule.fraction(2), 10) == 4  # 4.52
    assert floor_count(schedule.fraction(4), 10) == 3  # 3.27
    assert floor_count(schedule.fraction(0), 1) == 0


def test_the_end_is_a_fraction_of_the_run():
    schedule = UpdateSchedule.for_run(
        97_656, update_interval=100, stop_fraction=0.75, drop_fraction=0.3, decay="cosine"
    )
    assert schedule.t_end == 73_242
    assert schedule.update_steps(97_656) == 732


@pytest.mark.parametrize("total", [1, 5, 99, 100, 101, 400, 401])
@pytest.mark.parametrize("stop", [0.0, 0.33, 0.75, 1.0])
def test_update_steps_are_counted_like_they_are_taken(total, stop):
    schedule = UpdateSchedule.for_run(total, update_interval=7, stop_fraction=stop, drop_fraction=0.3, decay="cosine")
    assert schedule.update_steps(total) == sum(schedule.is_update_step(t) for t in range(total))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"update_interval": 0}, "update_interval: 0"),
        ({"update_interval": 2.5}, "update_interval: 2.5"),
        ({"drop_fraction": 1.5}, "drop_fraction: 1.5"),
        ({"stop_fraction": -1.0}, "stop_fraction: -1.0"),
        ({"decay": "cosin"}, "did you mean cosine"),
        ({"total_steps": 0}, "total_steps: 0"),
        ({"drop_fraction": math.nan}, "drop_fraction: nan"),
    ],
)
def test_bad_values_are_refused_by_name(changes, message):
    options = {"total_steps": 10, "update_interval": 1, "stop_fraction": 0.5, "drop_fraction": 0.3, "decay": "cosine"}
    with pytest.raises(ConfigError, match=message):
        UpdateSchedule.for_run(**(options | changes))


def test_inverse_power_by_hand():
    # alpha (1 - t / t_end)^k: 0.5 (0.8)^3 = 0.256 and 0.5 (0.6)^3 = 0.108; k = 1 is the linear decay.
    cubic = UpdateSchedule(1, 10.0, 0.5, "inverse_power")
    assert [cubic.fraction(t) for t in (0, 2, 4, 10)] == pytest.approx([0.5, 0.256, 0.108, 0.0])
    linear = UpdateSchedule(1, 10.0, 0.5, "inverse_power", decay_power=1.0)
    assert [linear.fraction(t) for t in (0, 2, 4, 10)] == pytest.approx([0.5, 0.4, 0.3, 0.0])


def test_the_end_may_be_an_update_step():
    def steps(**options):
        schedule = UpdateSchedule(5, 10.0, 0.3, **options)
        return [t for t in range(30) if schedule.is_update_step(t)]

    assert steps() == [5]
    assert steps(inclusive=True) == [5, 10]
    assert steps(start="on") == [4, 9]
    assert steps(start="zero") == [0, 5]
    assert steps(start="zero", inclusive=True) == [0, 5, 10]
    assert UpdateSchedule(5, 10.0, 0.3, inclusive=True).fraction(10) == 0.0


def test_the_report_rewires_at_its_hundredth_step_and_the_paper_at_its_hundred_and_first():
    # Counted from 1, as "optimizer.step() call number".
    report = UpdateSchedule(100, 65_918.0, 0.3, start="on")
    paper = UpdateSchedule(100, 65_918.0, 0.3)
    assert next(t + 1 for t in range(999) if report.is_update_step(t)) == 100
    assert next(t + 1 for t in range(999) if paper.is_update_step(t)) == 101


@given(
    st.integers(1, 40),
    st.floats(0, 300),
    st.booleans(),
    st.sampled_from(["after", "on", "zero"]),
    st.integers(0, 400),
)
def test_update_steps_of_every_start_and_end_are_counted_like_they_are_taken(interval, t_end, inclusive, start, total):
    schedule = UpdateSchedule(interval, t_end, 0.3, inclusive=inclusive, start=start)
    taken = [t for t in range(total) if schedule.is_update_step(t)]
    assert schedule.update_steps(total) == len(taken)
    assert all(0.0 <= schedule.fraction(t) <= 0.3 for t in taken)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(1, 50), st.integers(0, 400))
def test_prunings_are_counted_like_they_are_made(begin, length, interval, total):
    schedule = PruningSchedule(begin, begin + length, interval)
    made = [t for t in range(total) if schedule.is_update_step(t)]
    assert schedule.update_steps(total) == len(made)
    # Every interval from the beginning on, and at the end in any case.
    expected = {begin + i * interval for i in range(1000) if begin + i * interval <= begin + length} | {begin + length}
    assert made == sorted(t for t in expected if t < total)
    shares = [schedule.fraction(t) for t in range(begin, begin + length + 2)]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_the_reports_pruning_by_the_numbers_of_the_issue():
    # 0.8 (1 - (1 - (t - 700) / 65,218)^3) at t = 10,000 and half way, at 33,309.
    at = {"begin": 700, "end": 65_918, "final": 0.8}
    assert gradual_sparsity(10_000, **at) == pytest.approx(0.295754, abs=5e-7)
    assert gradual_sparsity(33_309, **at) == pytest.approx(0.7)
    schedule = PruningSchedule(700, 65_918, 100)
    assert 0.8 * schedule.fraction(10_000) == pytest.approx(0.295754, abs=5e-7)
    assert schedule.fraction(699) == 0.0
    assert [t for t in range(1000) if schedule.is_update_step(t)] == [700, 800, 900]
    assert schedule.is_update_step(65_900)
    assert schedule.is_update_step(65_918)
    assert not schedule.is_update_step(66_000)


def test_pruning_at_one_step_only():
    schedule = PruningSchedule(3, 3, 10)
    assert [t for t in range(9) if schedule.is_update_step(t)] == [3]
    assert (schedule.fraction(2), schedule.fraction(3)) == (0.0, 1.0)


def test_first_steps():
    schedule = FirstSteps(3)
    assert [schedule.is_update_step(t) for t in range(5)] == [True, True, True, False, False]
    assert [schedule.fraction(t) for t in range(3)] == [0.0, 0.0, 1.0]
    assert [schedule.update_steps(n) for n in (0, 2, 3, 100)] == [0, 2, 3, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruningSchedule(5, 4, 1), "pruning begins at step 5 and ends at 4"),
        (lambda: PruningSchedule(-1, 4, 1), "pruning begins at step -1"),
        (lambda: PruningSchedule(1, 4, 0), "pruning interval: 0"),
        (lambda: PruningSchedule(1.5, 4, 1), "pruning begin: 1.5"),
        (lambda: FirstSteps(0), "batches: 0"),
        (lambda: FirstSteps(1.5), "batches: 1.5"),
        (lambda: UpdateSchedule(1, 10.0, 0.3, "inverse_power", decay_power=-1.0), "decay_power: -1.0 is below 0"),
    ],
)
def test_bad_schedules_are_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
