"""Gradual magnitude pruning by hand: who goes, how many at each step, and that training goes on meanwhile."""

import math

import pytest
import torch

import fxsparse
from fxsparse import ConfigError, FxSparseWarning
from fxsparse.runtime.methods import Pruning

TEN = [float(i) for i in (3, 1, 8, 5, 9, 2, 7, 10, 4, 6)]
ONES = [1] * 10


def kept(run, site=0):
    return {int(w) for w, m in zip(TEN, run.masks[site], strict=True) if m}


def test_counts_at_each_step_and_who_goes(bench):
    # 10 -> 2, from step 1 to 5 every 2: 8 (1 - (1 - p)^3) with p = 0, .5, 1 is 0, 7, 8.
    run = bench([TEN], [ONES], "pruning", targets=[2], begin=1, end=5, interval=2)
    counts = []
    for _ in range(8):
        run.step([0.0] * 10)
        counts.append(run.counts[0])
    assert counts == [10, 10, 10, 3, 3, 2, 2, 2]
    assert kept(run) == {9, 10}
    assert [(r.step, r.active["layers.0.weight"]) for r in run.rewirer.history] == [(1, 10), (3, 3), (5, 2)]


@pytest.mark.parametrize("interval", [1, 3, 7])
def test_counts_follow_the_cubic_rule_of_zhu_and_gupta(bench, interval):
    size, target, begin, end = 200, 30, 4, 43
    run = bench(
        [[float(i) for i in range(size)]],
        [[1] * size],
        "pruning",
        targets=[target],
        begin=begin,
        end=end,
        interval=interval,
    )
    expected = size
    for t in range(50):
        if t == end or (begin <= t < end and (t - begin) % interval == 0):
            expected = size - math.floor(170 * (1 - (1 - (t - begin) / (end - begin)) ** 3) + 1e-9)
        run.step([0.0] * size)
        assert run.counts == [expected]
    assert expected == target
    assert run.masks[0] == [0] * (size - target) + [1] * target


def test_weights_move_on_pruning_steps_before_they_are_compared(bench):
    # Gradients move 3 to -1 and 2 to 4, at pruning: 3 is smaller then.
    run = bench([[3.0, 2.0]], [[1, 1]], "pruning", lambda p: torch.optim.SGD(p, lr=1.0), targets=[1], begin=0, end=0)
    run.step([4.0, -2.0])
    assert run.masks == [[0, 1]]
    assert run.weights == [[0.0, 4.0]]


def test_the_reports_code_prunes_in_place_of_the_update(bench):
    run = bench(
        [[3.0, 2.0]],
        [[1, 1]],
        "pruning",
        lambda p: torch.optim.SGD(p, lr=1.0),
        targets=[1],
        begin=0,
        end=0,
        semantics={"weight_update": "replaced"},
    )
    run.step([4.0, -2.0])
    assert run.weights == [[3.0, 0.0]]


def test_global_takes_the_smallest_of_all_layers(bench):
    weights = [[1.0, 2.0, 9.0, 8.0], [7.0, 3.0, 6.0, 5.0]]
    run = bench(weights, [[1] * 4] * 2, "pruning", targets=[2, 1], begin=0, end=1, scope="global")
    run.step([0.0] * 4, [0.0] * 4)
    assert run.counts == [4, 4]
    run.step([0.0] * 4, [0.0] * 4)
    assert run.masks == [[0, 0, 1, 1], [1, 0, 0, 0]]
    layer = bench(weights, [[1] * 4] * 2, "pruning", targets=[2, 1], begin=0, end=0)
    layer.step([0.0] * 4, [0.0] * 4)
    assert layer.masks == [[0, 0, 1, 1], [1, 0, 0, 0]]
    run = bench(
        [weights[0], [0.1, 0.2, 0.3, 0.4]], [[1] * 4] * 2, "pruning", targets=[1, 2], begin=0, end=0, scope="global"
    )
    with pytest.warns(FxSparseWarning, match=r"layers\.1\.weight is about to be emptied: 0 of the 2"):
        run.step([0.0] * 4, [0.0] * 4)
    assert run.masks == [[0, 1, 1, 1], [0] * 4]


def test_ties_keep_the_lowest_positions_and_the_momentum_goes(bench):
    make = lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9)  # noqa: E731
    run = bench([[1.0, -1.0, 1.0, 1.0]], [[1] * 4], "pruning", make, targets=[2], begin=1, end=1)
    run.step([1.0] * 4)
    run.step([1.0] * 4)
    assert run.masks == [[1, 1, 0, 0]]
    assert run.buffer("momentum_buffer") == [1.9, 1.9, 0.0, 0.0]


@pytest.mark.filterwarnings("ignore:.*about to be emptied")  # of a global threshold
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_the_final_sparsity_is_that_of_static_masks(scope, distribution):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(20, 50), torch.nn.ReLU(), torch.nn.Linear(50, 10), torch.nn.Linear(10, 3)
    )
    x = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    static = fxsparse.sparsify(model, x, "static", sparsity=0.8, distribution=distribution)
    sparse = fxsparse.sparsify(
        model, x, "pruning", sparsity=0.8, distribution=distribution, scope=scope, update_interval=2
    )
    assert sparse.sparsity == 0.0
    optimizer = torch.optim.SGD(sparse.parameters(), lr=1e-3)
    rewirer = sparse.attach(optimizer, total_steps=40)
    for _ in range(40):
        sparse(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert rewirer.history[-1].step == 30  # 65,918 of 87,890 of the run
    assert sum(sparse.active_counts.values()) == sum(static.active_counts.values())
    if scope == "layer":
        assert sparse.active_counts == static.active_counts
    for name, count in static.active_counts.items():
        if count == static.masks[name].numel():  # dense by the allocation
            assert sparse.active_counts[name] == count


def steps_of(total_steps, **options):
    schedule = Pruning(**options).schedule(type("Common", (), {"interval": 100})(), total_steps)
    return schedule.begin, schedule.end, schedule.interval


def test_begin_and_end_are_steps_or_shares():
    assert steps_of(87_890) == (700, 65_918, 100)
    assert steps_of(1000, begin=0.25, end=0.5) == (250, 500, 100)
    assert steps_of(1000, begin=7, end=900, interval=3) == (7, 900, 3)
    assert steps_of(100_000, end=5000) == (796, 5000, 100)  # an end in steps beside the beginning by default
    assert steps_of(1) == (0, 0, 100)
    assert steps_of(10, end=0.999) == (0, 9, 100)  # the last step there is


def test_bad_options():
    for options, message in [
        ({"scope": "globl"}, "scope: 'globl' is not one of layer, global"),
        ({"begin": -1}, "begin: -1 is neither"),
        ({"end": 1.0}, "end: 1.0 is neither a whole number of steps nor a share of the run"),
        ({"end": "x"}, "end: 'x'"),
        ({"interval": 0}, "pruning interval: 0"),
        ({"begin": 9, "end": 8}, "pruning begins at step 9 and ends at 8"),
        ({"redistribution": "gradient"}, "pruning grows nothing"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Pruning(**options)
    with pytest.raises(ConfigError, match="pruning ends at step 500, and the run has 500 steps"):
        steps_of(500, end=500)


def test_an_end_in_steps_is_accepted_before_the_length_of_the_run_is_known(bench):
    bench([TEN], [ONES], "pruning", targets=[2], end=5000, total_steps=10_000)
