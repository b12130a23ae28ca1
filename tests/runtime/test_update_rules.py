"""The pure rules on tensors, by hand and against sorting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxsparse import rigl_update, set_update
from fxsparse.runtime.update_rules import select, select_across


def test_rigl_by_hand():
    weight = torch.tensor([4.0, -1.0, 0.0, 2.0, 0.0, 3.0])
    mask = torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    grad = torch.tensor([0.1, 0.5, -3.0, 0.2, 2.0, 0.0])
    # k = 1 drops |-1| at 1; of the inactive {1, 2, 4} with 0.5, 3, 2 it grows 2.
    assert rigl_update(weight, grad, mask, 1).tolist() == [True, False, True, True, False, True]
    # k = 2 drops 1 and 3; of {1, 2, 3, 4} with 0.5, 3, 0.2, 2 it grows 2 and 4.
    assert rigl_update(weight, grad, mask, 2).tolist() == [True, False, True, False, True, True]
    # k = 0 changes nothing.
    assert torch.equal(rigl_update(weight, grad, mask, 0), mask)


def test_a_dropped_weight_may_grow_straight_back():
    weight = torch.tensor([4.0, 1.0, 0.0, 0.0])
    mask = torch.tensor([1, 1, 0, 0]).bool()
    grad = torch.tensor([0.0, 9.0, 5.0, 1.0])
    assert torch.equal(rigl_update(weight, grad, mask, 1), mask)


def test_ties_drop_the_highest_index_and_grow_the_lowest():
    weight = torch.tensor([1.0, -1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    mask = torch.tensor([1, 1, 1, 1, 0, 0, 0]).bool()
    grad = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0, -2.0, 2.0])
    assert rigl_update(weight, grad, mask, 2).tolist() == [True, True, False, False, True, True, False]


def test_a_newly_grown_weight_of_zero_counts_as_active():
    # The active weight 1 has magnitude 0, as the inactive ones have; only it may be dropped.
    weight = torch.tensor([3.0, 0.0, 0.0, 0.0])
    mask = torch.tensor([1, 1, 0, 0]).bool()
    grad = torch.tensor([0.0, 0.0, 0.0, 7.0])
    assert rigl_update(weight, grad, mask, 1).tolist() == [True, False, False, True]


def test_everything_can_be_dropped_and_a_dense_site_stays_dense():
    weight, grad = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 1.0])
    assert rigl_update(weight, grad, torch.ones(3).bool(), 3).tolist() == [True, True, True]


few_values = st.sampled_from([0.0, 0.5, 1.0, -1.0, 2.0, -2.0, 3.25])


@st.composite
def cases(draw):
    n = draw(st.integers(1, 30))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    weight = torch.tensor(draw(st.lists(few_values, min_size=n, max_size=n)), dtype=torch.float64) * mask
    grad = torch.tensor(draw(st.lists(few_values, min_size=n, max_size=n)), dtype=torch.float64)
    return weight, grad, mask, draw(st.integers(0, int(mask.sum())))


@given(cases())
def test_rigl_equals_sorting_under_many_ties(case):
    weight, grad, mask, k = case
    active = [i for i in range(len(mask)) if mask[i]]
    dropped = sorted(active, key=lambda i: (abs(weight[i].item()), -i))[:k]
    kept = [i for i in active if i not in dropped]
    candidates = [i for i in range(len(mask)) if i not in kept]
    grown = sorted(candidates, key=lambda i: (-abs(grad[i].item()), i))[:k]
    new = rigl_update(weight, grad, mask, k)
    assert sorted(new.nonzero().flatten().tolist()) == sorted(kept + grown)
    assert int(new.sum()) == int(mask.sum())


@given(cases())
def test_set_keeps_the_count_and_drops_by_magnitude(case):
    weight, _, mask, k = case
    new = set_update(weight, mask, k, torch.Generator().manual_seed(0))
    assert int(new.sum()) == int(mask.sum())
    lost = weight[mask & ~new].abs()
    stayed = weight[mask & new].abs()
    if len(lost) and len(stayed) and k < int(mask.sum()):
        # Whoever was lost was among the k smallest; a smaller one that stayed was dropped and grew back.
        assert lost.max() <= weight[mask].abs().sort().values[k - 1]


def test_set_grows_uniformly_over_the_inactive_positions():
    weight = torch.zeros(8)
    mask = torch.tensor([1, 1, 0, 0, 0, 0, 0, 0]).bool()
    weight[:2] = torch.tensor([2.0, 1.0])
    counts = torch.zeros(8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(7000):
        counts += set_update(weight, mask, 1, generator)
    assert counts[0] == 7000
    # Position 1 is dropped and may come back like any other: seven candidates, 1000 each, sd about 29.
    assert counts[1:].min() > 850
    assert counts[1:].max() < 1150


@pytest.mark.parametrize("shape", [(7, 5), (4, 3, 3, 3), (2, 2, 2, 2, 2)])
def test_any_shape_and_memory_layout_gives_the_same_positions(shape):
    generator = torch.Generator().manual_seed(1)
    score = torch.rand(shape, generator=generator)
    eligible = torch.rand(shape, generator=generator) > 0.3
    straight = select(score, eligible, 9, largest=True)
    strided = score.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert torch.equal(select(strided, eligible, 9, largest=True), straight)
    assert int(straight.sum()) == 9
    assert score[straight].min() >= score[eligible & ~straight].max()


@pytest.mark.parametrize("largest", [True, False])
def test_nan_is_selected_last_and_the_count_is_exact(largest):
    nan, inf = float("nan"), float("inf")
    score = torch.tensor([nan, 3.0, nan, 1.0, inf, 2.0])
    eligible = torch.tensor([1, 1, 1, 1, 0, 1]).bool()
    for count in range(6):
        chosen = select(score, eligible, count, largest=largest)
        assert int(chosen.sum()) == count
        assert not (chosen & ~eligible).any()
        assert int(chosen[[0, 2]].sum()) == max(count - 3, 0)


def test_a_ranking_over_several_tensors_by_hand():
    scores = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([[2.0, 5.0], [0.5, 9.0]])]
    candidates = [torch.tensor([1, 1, 1]).bool(), torch.tensor([[1, 1], [1, 0]]).bool()]
    first, second = select_across(scores, candidates, 3)  # 5, 3, and of the two 2s the earlier tensor's
    assert first.tolist() == [True, False, True]
    assert second.tolist() == [[False, True], [False, False]]
    first, second = select_across(scores, candidates, 6)
    assert first.all() and second.tolist() == [[True, True], [True, False]]
