"""The learning rate, against the report's recipe and numbers worked out by hand."""

import pytest

from fxsparse.training import TrainConfig
from fxsparse.training.schedule import learning_rate


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.1),
        (29_999, 0.1),
        (30_000, 0.02),
        (59_999, 0.02),
        (60_000, 0.004),
        (90_000, 0.0008),
        (97_655, 0.0008),
    ],
)
def test_the_default_milestones_are_every_30000_steps_of_the_reports_run(step, rate):
    config = TrainConfig(data="cifar10").resolved()
    found = learning_rate(
        step,
        97_656,
        base=config.lr,
        schedule=config.schedule,
        milestones=config.milestones,
        gamma=config.gamma,
    )
    assert found == pytest.approx(rate)


def test_milestones_above_one_are_steps():
    rates = [learning_rate(s, 10, base=1.0, schedule="step", milestones=(2, 0.5), gamma=0.5) for s in range(10)]
    assert rates == [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25]


def test_cosine_and_constant():
    rates = [learning_rate(s, 4, base=0.8, schedule="cosine") for s in range(4)]
    assert rates == pytest.approx([0.8, 0.682842712474619, 0.4, 0.117157287525381])
    assert [learning_rate(s, 4, base=0.8, schedule="constant") for s in range(4)] == [0.8] * 4


def test_warm_up_rises_linearly_and_cosine_falls_after_it():
    rates = [learning_rate(s, 8, base=1.0, schedule="cosine", warmup_steps=4) for s in range(8)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[6] == pytest.approx(0.5)
