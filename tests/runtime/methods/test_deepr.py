"""Deep rewiring by hand: fixed signs, drift, noise, and a random connection for every one that is retired."""

import pytest
import torch

from fxsparse import ConfigError
from fxsparse.runtime.update_rules import deepr_walk


def test_the_walk_by_hand():
    weight, sign = torch.tensor([0.5, -0.5, 0.1, -0.1]), torch.tensor([1, -1, 1, -1], dtype=torch.int8)
    noise = torch.tensor([1.0, 1.0, -2.0, -2.0])
    # theta = sign w = [.5, .5, .1, .1]; theta - .2 + .1 noise = [.4, .4, -.3, -.3].
    walked = deepr_walk(weight, sign, noise, drift=0.2, spread=0.1)
    torch.testing.assert_close(walked, torch.tensor([0.4, -0.4, -0.3, 0.3]))


def sgd(lr):
    return lambda p: torch.optim.SGD(p, lr=lr)


def test_the_drift_is_the_learning_rate_times_l1(bench):
    run = bench([[1.0, -2.0, 0.0]], [[1, 1, 0]], "deepr", sgd(0.5), l1=0.25, noise=0.0)
    run.step([0.0] * 3)
    assert run.weights == [[0.875, -1.875, 0.0]]
    run.step([1.0, 1.0, 1.0])
    assert run.weights == [[0.25, -2.25, 0.0]]  # - .5 - .125, and - .5 + .125


def test_the_noise_has_the_standard_deviation_of_lr_times_noise(bench):
    start = [5.0, -5.0] * 2000
    run = bench([start], [[1] * 3999 + [0]], "deepr", sgd(0.5), l1=0.0, noise=0.25)
    run.step([0.0] * 4000)
    moved = torch.tensor(run.weights[0][:3999]) - torch.tensor(start[:3999])
    assert moved.std().item() == pytest.approx(0.125, rel=0.05)
    assert abs(moved.mean().item()) < 4 * 0.125 / 3999**0.5
    first = run.weights
    run.step([0.0] * 4000)
    again = torch.tensor(run.weights[0][:3999]) - torch.tensor(first[0][:3999])
    assert not torch.equal(moved, again)  # another draw in every step


def test_a_connection_that_would_change_its_sign_is_retired(bench):
    woken = set()
    for seed in range(60):
        run = bench([[1.0, -1.0, 3.0, 0.0, 0.0]], [[1, 1, 1, 0, 0]], "deepr", sgd(1.0), l1=0.0, noise=0.0, seed=seed)
        run.step([2.0, 1.0, 1.0, 9.0, 9.0])  # 1 - 2 < 0 is retired; -2 and 2 stay
        (mask,), (weight,) = run.masks, run.weights
        assert mask[1:3] == [1, 1] and sum(mask) == 3
        assert weight == [0.0, -2.0, 2.0, 0.0, 0.0]  # the new one starts from 0
        woken.add(next(i for i in (0, 3, 4) if mask[i]))
    assert woken == {0, 3, 4}  # anyone inactive, the one just retired included


def test_it_is_retired_in_the_very_first_step_and_at_zero_it_is_not(bench):
    run = bench([[1.0, 1.0, 0.0]], [[1, 1, 0]], "deepr", sgd(1.0), l1=0.0, noise=0.0)
    run.step([1.0, 0.0, 0.0])  # to 0 exactly: its sign has not changed
    assert run.masks == [[1, 1, 0]]
    run = bench([[1.0, 1.0, 0.0]], [[1, 1, 0]], "deepr", sgd(1.0), l1=0.0, noise=0.0)
    run.step([1.5, 0.0, 0.0])
    assert run.weights == [[0.0, 1.0, 0.0]]


def test_the_sign_is_fixed_for_good(bench):
    run = bench([[1.0] * 20 + [-1.0] * 20 + [0.0] * 40], [[1] * 40 + [0] * 40], "deepr", sgd(0.5), noise=1.0, l1=0.1)
    generator = torch.Generator().manual_seed(0)
    signs = torch.zeros(80, dtype=torch.int64)
    retired = 0
    for _ in range(60):
        before = run.masks[0]
        run.step(torch.randn(80, generator=generator).tolist())
        retired += sum(b and not a for a, b in zip(run.masks[0], before, strict=True))
        assert run.counts == [40]
        seen = torch.tensor(run.weights[0]).sign().long()
        assert ((seen == 0) | (signs == 0) | (seen == signs)).all()
        signs = torch.where(signs == 0, seen, signs)
        if len(run.rewirer.history) == 0:
            assert signs[:20].min() >= 0 and signs[20:40].max() <= 0
    assert retired > 20
    assert (signs[40:] > 0).sum() >= 8 and (signs[40:] < 0).sum() >= 8  # drawn for those that began inactive


def test_a_record_every_interval_adds_up_what_woke(bench):
    run = bench([[1.0, 1.0] + [0.0] * 30], [[1, 1] + [0] * 30], "deepr", sgd(1.0), l1=0.0, noise=0.0, update_interval=3)
    grown = 0
    for _ in range(6):
        before = run.masks[0]
        # Every active one is pushed against the sign of what it has, or stays at 0.
        run.step([9.0 if w > 0 else -9.0 if w < 0 else 1.0 for w in run.weights[0]])
        grown += sum(a and not b for a, b in zip(run.masks[0], before, strict=True))
    records = run.rewirer.history
    assert [record.step for record in records] == [2, 5]
    assert sum(record.changed["layers.0.weight"] for record in records) == grown > 0


def test_bad_options(bench):
    for options, message in [
        ({"l1": -1.0}, "l1: -1.0 is below 0"),
        ({"noise": float("nan")}, "noise: nan"),
        ({"redistribution": "momentum"}, "deepr keeps every layer's number"),
    ]:
        with pytest.raises(ConfigError, match=message):
            bench([[1.0, 2.0]], [[1, 0]], "deepr", **options)
