"""Dynamic sparse reparameterisation by hand: the threshold, what is kept, what grows where."""

import pytest
import torch

from fxsparse import ConfigError, FxSparseWarning

ZEROS = [0.0] * 8


def threshold(run):
    return run.rewirer.method.state_dict()["threshold"]


def test_the_threshold_is_global_and_regrowth_follows_what_was_kept(bench):
    # Below .5: three of the first layer's four, none of the second's: 1 and 4 are kept, which share the 3 as .6 : 2.4.
    weights = [[0.1, -0.2, 0.3, 4.0, 0, 0, 0, 0], [0.6, 0.7, -0.8, 0.9, 0, 0, 0, 0]]
    run = bench(weights, [[1] * 4 + [0] * 4] * 2, "dsr", threshold=0.5, drop_fraction=0.375)
    run.step(ZEROS, ZEROS)
    run.step(ZEROS, ZEROS)
    assert run.counts == [2, 6]
    assert run.masks[0][3] == 1
    assert run.masks[1][:4] == [1] * 4
    assert threshold(run) == 0.5  # .375 * 8 = 3 were wanted, and 3 fell
    # All that grew starts from 0 or is, where it came straight back, what it was.
    assert all(w in (0.0, b) for w, b in zip(run.weights[0], weights[0], strict=True))


def dropped(bench, count, wanted, **options):
    """The threshold, 1.0 at first, after a rewiring in which `count` of 40 weights were below it."""
    weights = [[0.5] * count + [2.0] * (40 - count) + [0.0] * 40]
    run = bench(weights, [[1] * 40 + [0] * 40], "dsr", threshold=1.0, drop_fraction=wanted / 40, **options)
    run.step([0.0] * 80)
    run.step([0.0] * 80)
    assert run.counts == [40]
    return threshold(run)


@pytest.mark.parametrize(("count", "after"), [(0, 2.0), (8, 2.0), (9, 1.0), (10, 1.0), (11, 1.0), (12, 0.5), (40, 0.5)])
def test_the_threshold_doubles_and_halves_beyond_the_tolerance(bench, count, after):
    assert dropped(bench, count, wanted=10) == after  # 10 % of 10: from 9 to 11 it stays


def test_tolerance_and_nothing_wanted(bench):
    assert dropped(bench, 6, wanted=10, tolerance=0.5) == 1.0
    assert dropped(bench, 9, wanted=10, tolerance=0.0) == 2.0
    assert dropped(bench, 0, wanted=0) == 1.0
    assert dropped(bench, 1, wanted=0) == 0.5


def test_a_layer_keeps_its_largest_connection(bench):
    for seed in range(10):
        run = bench([[0.1, -0.3, 0.2, 0.0], [5.0, 6.0, 7.0, 0.0]], [[1, 1, 1, 0]] * 2, "dsr", threshold=1.0, seed=seed)
        run.step([0.0] * 4, [0.0] * 4)
        run.step([0.0] * 4, [0.0] * 4)
        # The first keeps one of three, the second all three: shares 1 : 3 of 2, and the second has room for one.
        assert run.counts == [2, 4]
        assert run.masks[0][1] == 1


def test_the_threshold_steers_to_the_fraction_wanted(bench):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 400, generator=generator).tolist()
    run = bench(weights, [[1] * 200 + [0] * 200] * 2, "dsr", lambda p: torch.optim.SGD(p, lr=0.1), drop_fraction=0.25)
    below = []
    for _ in range(25):
        for p in run.sparse.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        run.sparse.apply_masks_()
        strengths = torch.cat([p.detach().flatten() for p in run.sparse.parameters()]).abs()
        active = torch.cat([m.flatten() for m in run.sparse.masks.values()])
        below.append(int((active & (strengths < threshold(run))).sum()))
        run.step([0.0] * 400, [0.0] * 400)
        assert sum(run.counts) == 400
    # It wants 100 of 400 at a time: from 1e-3 up, then at most a doubling beside it.
    assert below[1] < 10
    assert all(50 <= count <= 200 for count in below[15:])


def test_an_empty_layer_stays_an_empty_layer(bench):
    run = bench([[0.0] * 4, [5.0, 0.1, 7.0, 0.0]], [[0] * 4, [1, 1, 1, 0]], "dsr", threshold=1.0, targets=[1, 3])
    with pytest.warns(FxSparseWarning, match="about to be emptied: 0 of the 1"):
        for _ in range(4):
            run.step([0.0] * 4, [0.0] * 4)
            assert run.counts == [0, 3]


def test_bad_options(bench):
    for options, message in [
        ({"threshold": 0.0}, "threshold: 0.0 is not above 0"),
        ({"tolerance": 1.0}, r"tolerance: 1.0 is outside \[0, 1\)"),
        ({"threshold": "x"}, "threshold: 'x'"),
        ({"redistribution": "gradient"}, "dsr has its own"),
    ]:
        with pytest.raises(ConfigError, match=message):
            bench([[1.0, 2.0]], [[1, 0]], "dsr", **options)
