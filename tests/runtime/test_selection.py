"""Exact selection against sorting in plain Python: ties, NaN, infinities, signed zeros, dtypes and memory formats."""

import math
import random

import pytest
import torch

from fxsparse import rigl_update
from fxsparse.core.zeroing import norm_within, zero_outside_, zeroed_outside
from fxsparse.runtime import selection
from fxsparse.runtime.selection import select

NAN, INF = float("nan"), float("inf")
POOLS = [
    [0.0, 1.0, 2.0], [0.0, -0.0, 1.0, -1.0], [NAN, INF, -INF, 0.0, 1.0], [NAN, INF, 1.0, 2.0], [NAN], [0.5], None,
]  # fmt: skip
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def by_sorting(score, candidates, count, largest):
    """The specified rule: NaN is as bad as the worst infinity, ties go by flat index."""
    worst = -INF if largest else INF
    values = [worst if math.isnan(value) else value for value in score.reshape(-1).tolist()]
    eligible = [i for i, own in enumerate(candidates.reshape(-1).tolist()) if own]
    eligible.sort(key=(lambda i: (-values[i], i)) if largest else (lambda i: (values[i], -i)))
    chosen = set(eligible[:count])
    return [i in chosen for i in range(len(values))]


def case(pick, length):
    pool = pick.choice(POOLS)
    values = [pick.gauss(0, 1) if pool is None else pick.choice(pool) for _ in range(length)]
    score = torch.tensor(values).to(pick.choice(DTYPES))
    if pick.random() < 0.5:
        score = score.abs()
    share = pick.choice([0.1, 0.5, 0.9, 1.0])
    candidates = torch.tensor([pick.random() < share for _ in range(length)])
    active = int(candidates.sum())
    return score, candidates, pick.choice([0, active, pick.randint(0, active)]), pick.random() < 0.5


@pytest.mark.parametrize("way", ["host", "device"])
@pytest.mark.parametrize("sample", [1 << 14, 8, 2])
def test_equals_sorting(sample, way, monkeypatch):
    """With samples of many sizes, those that mislead among them."""
    monkeypatch.setattr(selection, "SAMPLE", sample)
    monkeypatch.setattr(selection, "on_host", lambda tensor: way == "host")
    pick = random.Random(sample)
    for _ in range(700):
        score, candidates, count, largest = case(pick, pick.randint(1, 60 if sample > 8 else 150))
        chosen = select(score, candidates, count, largest=largest)
        assert chosen.dtype == torch.bool and chosen.shape == candidates.shape
        assert chosen.tolist() == by_sorting(score, candidates, count, largest), (score, candidates, count, largest)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("kind", ["normal", "one value dominates", "few values", "all alike", "misleading", "NaN"])
def test_large_tensors(kind, largest):
    """Larger than a sample by far: the bracket holds, has many ties in it, or is wrong."""
    generator = torch.Generator().manual_seed(0)
    size = 300_001
    score = torch.rand(size, generator=generator)
    if kind == "one value dominates":
        score[torch.rand(size, generator=generator) < 0.93] = 0.0
    elif kind == "few values":
        score = (score * 4).floor()
    elif kind == "all alike":
        score.fill_(0.25)
    elif kind == "misleading":
        score[::19] += 1.0  # the step of the sample: it sees these alone
    elif kind == "NaN":
        score[torch.rand(size, generator=generator) < 0.25] = NAN
    candidates = torch.rand(size, generator=generator) < 0.6
    known = score.nan_to_num(nan=-INF if largest else INF)
    order = torch.sort(-known, stable=True).indices
    if not largest:
        order = torch.sort(known.flip(0), stable=True).indices
        order = size - 1 - order
    order = order[candidates[order]]
    numbers = int(torch.isfinite(score[order]).sum())
    for count in (1, 100, len(order) // 3, numbers - 5, numbers - 1, len(order) - 1, len(order)):
        expected = torch.zeros(size, dtype=torch.bool)
        expected[order[:count]] = True
        assert torch.equal(select(score, candidates, count, largest=largest), expected)


def test_the_misleading_sample_does_mislead():
    """What the test above relies on."""
    step = 300_001 // selection.SAMPLE
    while math.gcd(step, 210) > 1:
        step += 1
    assert step == 19


@pytest.mark.parametrize("way", ["host", "device"])
@pytest.mark.parametrize("values", [4, 10**9])
def test_channels_last_gives_the_same_positions(values, way, monkeypatch):
    """Flat indices are those of the contiguous tensor, with ties and without."""
    monkeypatch.setattr(selection, "on_host", lambda tensor: way == "host")
    generator = torch.Generator().manual_seed(values)
    for shape in [(6, 5, 3, 3), (4, 7, 1, 1), (1, 6, 3, 2), (32, 32, 9, 9)]:
        score = torch.randint(0, values, shape, generator=generator).float()
        candidates = torch.rand(shape, generator=generator) < 0.7
        for largest in (True, False):
            for count in (1, int(candidates.sum()) // 2):
                straight = select(score, candidates, count, largest=largest)
                for one in (torch.channels_last, torch.contiguous_format):
                    for two in (torch.channels_last, torch.contiguous_format):
                        own = score.contiguous(memory_format=one), candidates.contiguous(memory_format=two)
                        assert torch.equal(select(*own, count, largest=largest), straight)


def test_the_same_for_every_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-50, 50, (256, 300, 3, 3), generator=generator).float()
    gradient = torch.randint(-50, 50, weight.shape, generator=generator).float()
    mask = torch.rand(weight.shape, generator=generator) < 0.1
    before, masks = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            masks.append(rigl_update(weight * mask, gradient, mask, 3000))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(mask, masks[0]) for mask in masks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_zeros_wherever_a_mask_is_false(dtype, layout):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(4, 6, 3, 3, generator=generator).to(dtype).contiguous(memory_format=layout)
    tensor[0, 0] = torch.tensor([NAN, INF, -INF])
    keep = torch.rand(tensor.shape, generator=generator) < 0.5
    expected = torch.where(keep, tensor, torch.zeros((), dtype=dtype))
    original = tensor.clone()
    copy = zeroed_outside(tensor, keep)
    torch.testing.assert_close(copy, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(tensor, original, rtol=0, atol=0, equal_nan=True)
    assert zero_outside_(tensor, keep) is tensor
    torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True)
    assert not torch.signbit(tensor[~keep]).any()


def test_the_norm_over_some_positions():
    generator = torch.Generator().manual_seed(0)
    for size in (5, 1 << 18, 600_001):
        tensor = torch.randn(size, generator=generator)
        keep = torch.rand(size, generator=generator) < 0.1
        assert float(norm_within(tensor, keep)) == pytest.approx(float(tensor[keep].double().norm()), rel=1e-5)
    assert float(norm_within(torch.tensor([3.0, NAN, 4.0]), torch.tensor([True, False, True]))) == 5.0
