"""Allocation against the paper's and the report's facts, hand-worked numbers and conservation laws."""

import math

import pytest
import torchvision
from hypothesis import assume, given
from hypothesis import strategies as st

import fxsparse
from fxsparse import models
from fxsparse.core.masking import floor_count


def conv_and_linear_shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim >= 2}


@pytest.mark.parametrize(("sparsity", "dense_sites"), [(0.9, 4), (0.8, 5)])
def test_wide_resnet_keeps_as_many_sites_dense_as_the_report(sparsity, dense_sites):
    shapes = conv_and_linear_shapes(models.wide_resnet22_2())
    assert len(shapes) == 23
    result = fxsparse.allocate(shapes, sparsity, "erk")
    assert sum(s == 0.0 for s in result.values()) == dense_sites


@pytest.mark.parametrize(("sparsity", "dense_sites"), [(0.9, 1), (0.8, 8)])
def test_imagenet_resnet50_keeps_as_many_sites_dense_as_the_paper(sparsity, dense_sites):
    shapes = conv_and_linear_shapes(torchvision.models.resnet50(weights=None))
    result = fxsparse.allocate(shapes, sparsity, "erk")
    assert sum(s == 0.0 for s in result.values()) == dense_sites


def test_er_by_hand():
    # (10 + 10) / 100 = 0.2 and (20 + 5) / 100 = 0.25; budget 0.1 * 200 = 20 = scale * (20 + 25).
    result = fxsparse.allocate({"a": (10, 10), "b": (20, 5)}, 0.9, "er")
    scale = 20 / 45
    assert result["a"] == pytest.approx(1 - 0.2 * scale)
    assert result["b"] == pytest.approx(1 - 0.25 * scale)


def test_erk_by_hand_counts_the_kernel_and_er_does_not():
    # ERK: (4 + 2 + 3 + 3) / (4 * 2 * 9) = 1/6 of 72; the linear (6 + 3) / 18 = 1/2 of 18.
    # Budget 0.25 * 90 = 22.5 = scale * (12 + 9), so scale = 15/14.
    shapes = {"conv": (4, 2, 3, 3), "linear": (6, 3)}
    result = fxsparse.allocate(shapes, 0.75, "erk")
    assert result["conv"] == pytest.approx(1 - 15 / 14 / 6)
    assert result["linear"] == pytest.approx(1 - 15 / 14 / 2)
    # ER: the convolution is (4 + 2) / 8 = 3/4 of 72 = 54; scale = 22.5 / 63 = 5/14.
    result = fxsparse.allocate(shapes, 0.75, "er")
    assert result["conv"] == pytest.approx(1 - 5 / 14 * 0.75)


def test_a_site_that_would_pass_density_one_becomes_dense_and_the_rest_is_solved_again():
    # ER proportions 2 (1x1) and 0.02 (100x100): at sparsity 0.5 the first would have density 49.5.
    result = fxsparse.allocate({"tiny": (1, 1), "big": (100, 100)}, 0.5, "er")
    assert result["tiny"] == 0.0
    assert result["big"] == pytest.approx(1 - (0.5 * 10_001 - 1) / 10_000)


def test_uniform_keeps_the_first_site_dense_and_gives_all_others_the_sparsity():
    shapes = {"a": (4, 4), "b": (8, 8), "c": (2, 2)}
    assert fxsparse.allocate(shapes, 0.9, "uniform") == {"a": 0.0, "b": 0.9, "c": 0.9}


def test_power_zero_makes_the_proportions_equal():
    result = fxsparse.allocate({"a": (10, 10), "b": (50, 7)}, 0.8, "er", power=0.0)
    assert result["a"] == pytest.approx(0.8)
    assert result["b"] == pytest.approx(0.8)


def test_dense_sites_stay_in_the_budget_and_the_others_make_up_for_them():
    result = fxsparse.allocate({"a": (10, 10), "b": (20, 20), "c": (20, 20)}, 0.5, "er", dense=["a"])
    assert result["a"] == 0.0
    assert result["b"] * 400 + result["c"] * 400 == pytest.approx(0.5 * 900)


def test_explicit_numbers_mix_with_solved_ones():
    shapes = {"x.weight": (10, 10), "y.weight": (20, 20), "z.weight": (30, 30)}
    result = fxsparse.allocate(shapes, 0.7, "erk", explicit={"y.*": 0.5})
    assert result["y.weight"] == 0.5
    assert sum(result[n] * math.prod(s) for n, s in shapes.items()) == pytest.approx(0.7 * 1400)


def test_a_mapping_gives_every_site_its_sparsity():
    assert fxsparse.allocate({"a": (2, 2), "b": (2, 2)}, 0.5, {"a": 0.25, "b": 0.75}) == {"a": 0.25, "b": 0.75}
    with pytest.raises(fxsparse.SelectionError, match="no sparsity given for b"):
        fxsparse.allocate({"a": (2, 2), "b": (2, 2)}, 0.5, {"a": 0.25})


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_outside_the_range_is_refused(sparsity):
    with pytest.raises(fxsparse.AllocationError, match="outside"):
        fxsparse.allocate({"a": (2, 2)}, sparsity)


def test_bad_arguments_name_the_cause():
    with pytest.raises(fxsparse.AllocationError, match="no weight sites"):
        fxsparse.allocate({}, 0.5)
    with pytest.raises(
        fxsparse.SelectionError, match=r"'layer1\.conv' matches no weight site; did you mean layer1\.conv1"
    ):
        fxsparse.allocate({"layer1.conv1": (4, 4)}, 0.5, dense=["layer1.conv"])
    with pytest.raises(fxsparse.ConfigError, match=r"'erl' is not one of uniform, er, erk"):
        fxsparse.allocate({"a": (4, 4)}, 0.5, "erl")
    with pytest.raises(fxsparse.AllocationError, match=r"expected \(out, in, \*kernel\)"):
        fxsparse.allocate({"a": (4,)}, 0.5)
    with pytest.raises(fxsparse.SelectionError, match="name it once"):
        fxsparse.allocate({"a": (4, 4), "b": (4, 4)}, 0.5, dense=["a"], explicit={"a": 0.5})


def test_infeasible_combinations_are_refused():
    with pytest.raises(fxsparse.AllocationError, match="no solution"):
        fxsparse.allocate({"a": (10, 10), "b": (2, 2)}, 0.9, "er", dense=["a"])
    with pytest.raises(fxsparse.AllocationError, match="no solution"):
        fxsparse.allocate({"a": (10, 10), "b": (2, 2)}, 0.1, "er", explicit={"a": 1.0})


shapes_strategy = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([(), (3,), (3, 3), (1, 1), (2, 3, 3)])),
    min_size=1,
    max_size=8,
).map(lambda rows: {f"w{i}": (o, n, *kernel) for i, (o, n, kernel) in enumerate(rows)})


@given(shapes_strategy, st.floats(0.0, 0.99), st.sampled_from(["er", "erk"]), st.sampled_from([0.5, 1.0, 2.0]))
def test_the_budget_is_met_and_the_proportions_hold(shapes, sparsity, distribution, power):
    result = fxsparse.allocate(shapes, sparsity, distribution, power=power)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = sum(sizes.values())
    assert list(result) == list(shapes)
    assert all(-1e-12 <= s <= 1.0 for s in result.values())
    assert sum(result[n] * sizes[n] for n in sizes) == pytest.approx(sparsity * total, rel=1e-9, abs=1e-6)
    # Exact up to one element a site once the counts are whole numbers.
    removed = sum(floor_count(result[n], sizes[n]) for n in sizes)
    assert removed <= sparsity * total + 1e-6
    assert removed > sparsity * total - len(sizes) - 1e-6

    def proportion(shape):
        out, inputs, *kernel = shape
        extra = sum(kernel) if distribution == "erk" else 0
        size = out * inputs * (math.prod(kernel) if distribution == "erk" else 1)
        return ((out + inputs + extra) / size) ** power

    scales = [(1 - result[n]) / proportion(shapes[n]) for n in shapes if result[n] > 1e-9]
    assume(len(scales) > 1)
    assert max(scales) == pytest.approx(min(scales), rel=1e-6)


@pytest.mark.parametrize(
    ("fraction", "count", "expected"),
    [
        (0.29, 100, 29),
        (0.9, 10, 9),
        (0.7, 10, 7),
        (1 - 0.8, 10, 2),
        (0.333, 10, 3),
        (0.9, 25, 22),
        (0.0, 7, 0),
        (1.0, 7, 7),
    ],
)
def test_floor_count_takes_the_product_that_was_meant(fraction, count, expected):
    assert floor_count(fraction, count) == expected


@pytest.mark.parametrize("arguments", [([(4, 4)], 0.5), ({"a": 4}, 0.5), ({"a": (4, 4)}, "0.5"), ({"a": (4, 4)}, True)])
def test_wrong_types_are_refused_by_name(arguments):
    with pytest.raises(fxsparse.FxSparseError, match=r"shape|sparsity"):
        fxsparse.allocate(*arguments)
    with pytest.raises(fxsparse.ConfigError, match="power"):
        fxsparse.allocate({"a": (4, 4)}, 0.5, power=math.nan)
