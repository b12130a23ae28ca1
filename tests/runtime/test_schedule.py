"""When and how much: the paper's schedule by hand."""

import math

import pytest

from fxsparse import ConfigError
from fxsparse.core.masking import floor_count
from fxsparse.runtime.schedule import UpdateSchedule


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
