"""SNIP by hand: |w * grad| of the first batches, exact counts, no weight moves while it looks."""

import pytest
import torch

import fxsparse
from fxsparse import FxSparseWarning
from fxsparse.runtime.update_rules import snip_score

WEIGHT, GRADIENT = [0.1, 0.9, 0.2, 0.5], [5.0, 1.0, 3.0, 0.5]
ONES = [1, 1, 1, 1]


def test_the_score_of_the_issue():
    score = snip_score(torch.tensor(WEIGHT), torch.tensor(GRADIENT))
    torch.testing.assert_close(score, torch.tensor([0.5, 0.9, 0.6, 0.25]))


def test_small_halves_do_not_vanish():
    tiny = torch.tensor([1e-4], dtype=torch.float16)
    assert snip_score(tiny, tiny).item() == pytest.approx(1e-8, rel=1e-2)


@pytest.mark.parametrize(("target", "mask"), [(1, [0, 1, 0, 0]), (2, [0, 1, 1, 0]), (3, [1, 1, 1, 0])])
def test_one_batch_by_hand(bench, target, mask):
    run = bench([WEIGHT], [ONES], "snip", lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5), targets=[target])
    assert run.sparse.active_counts == {"layers.0.weight": 4}  # it starts dense
    run.step(GRADIENT)
    assert run.masks == [mask]
    assert run.weights[0] == [w * m for w, m in zip(WEIGHT, mask, strict=True)]  # nothing moved, nor decayed
    # From then on it is static, and trains.
    for _ in range(20):
        run.step(GRADIENT)
    assert run.masks == [mask]
    assert run.weights[0][1] != WEIGHT[1]
    assert [record.step for record in run.rewirer.history] == [0]


def test_ties_keep_the_lowest_positions(bench):
    run = bench([[1.0, 2.0, -1.0, 2.0]], [ONES], "snip", targets=[3])
    run.step([2.0, 1.0, 2.0, -1.0])
    assert run.masks == [[1, 1, 1, 0]]


def test_per_layer_and_global_differ_by_hand(bench):
    # Scores: [.5, .9, .6, .25] and [1.8, .1, .7, .3]; the targets are 1 and 2, together 3.
    weights, gradients = [WEIGHT, [0.9, 0.1, 0.7, 0.3]], [GRADIENT, [2.0, 1.0, 1.0, 1.0]]
    layer = bench(weights, [ONES, ONES], "snip", targets=[1, 2])
    layer.step(*gradients)
    assert layer.masks == [[0, 1, 0, 0], [1, 0, 1, 0]]
    weights, gradients = [WEIGHT, [0.9, 0.1, 0.7, 0.3]], [GRADIENT, [0.2, 0.1, 1.0, 0.1]]
    whole = bench(weights, [ONES, ONES], "snip", targets=[1, 2], scope="global")
    whole.step(*gradients)  # scores [.5, .9, .6, .25], [.18, .01, .7, .03]: the three largest are .9, .7, .6
    assert whole.masks == [[0, 1, 1, 0], [0, 0, 1, 0]]


def test_a_site_that_the_allocation_makes_dense_stays_so_globally(bench):
    run = bench([WEIGHT, [1e-6] * 4], [ONES, ONES], "snip", targets=[2, 4], scope="global")
    run.step(GRADIENT, [1e-6] * 4)
    assert run.masks == [[0, 1, 1, 0], ONES]


def test_several_batches_average_the_gradients_before_the_magnitude(bench):
    run = bench([WEIGHT], [ONES], "snip", lambda p: torch.optim.SGD(p, lr=1.0), targets=[2], batches=3)
    for gradient in ([9.0, 1.0, 0.0, 0.0], [-9.0, 0.0, 3.0, 0.0]):
        run.step(gradient)
        assert run.masks == [ONES]
        assert run.weights == [WEIGHT]
    run.step([0.0, 0.0, 0.0, 0.6])  # sums [0, 1, 3, .6]: scores [0, .9, .6, .3]
    assert run.masks == [[0, 1, 1, 0]]
    assert run.weights == [[0.0, 0.9, 0.2, 0.0]]
    assert [(record.step, record.active) for record in run.rewirer.history] == [(2, {"layers.0.weight": 2})]


def test_magnitude_semantics_average_the_magnitudes(bench):
    run = bench([WEIGHT], [ONES], "snip", targets=[2], batches=2, semantics={"gradient": "magnitude"})
    run.step([9.0, 1.0, 0.0, 0.0])
    run.step([-9.0, 0.0, 3.0, 0.0])  # sums [18, 1, 3, 0]: scores [1.8, .9, .6, 0]
    assert run.masks == [[1, 1, 0, 0]]


def test_a_batch_that_is_not_finite_puts_it_off(bench):
    run = bench([WEIGHT], [ONES], "snip", lambda p: torch.optim.SGD(p, lr=1.0), targets=[2])
    with pytest.warns(FxSparseWarning, match="step 0 was skipped: a dense gradient was not finite"):
        run.step([5.0, float("inf"), 3.0, 0.5])
    assert run.masks == [ONES]
    assert (run.rewirer.step_count, run.rewirer.skipped_updates) == (0, 1)
    run.step(GRADIENT)
    assert run.masks == [[0, 1, 1, 0]]
    assert run.rewirer.step_count == 1


def test_a_site_without_a_gradient_has_no_influence(bench):
    run = bench([WEIGHT, [9.0] * 4], [ONES, ONES], "snip", targets=[2, 1], scope="global")
    with pytest.warns(FxSparseWarning, match="about to be emptied: 0 of the 1 weights"):
        run.step(GRADIENT, None)
    assert run.masks == [[1, 1, 1, 0], [0, 0, 0, 0]]


def test_more_batches_than_steps_are_refused(bench):
    with pytest.raises(fxsparse.ConfigError, match="batches: 5 is more than the 4 optimizer steps"):
        bench([WEIGHT], [ONES], "snip", targets=[2], batches=5, total_steps=4)
