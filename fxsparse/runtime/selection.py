"""Exactly so many of the best positions: what every drop and grow comes down to, on the host and on a device.

Both ways give the same positions, bit for bit and on every run: the threshold is a value that stands in the data, and
what ties with it is taken by flat index. On a device nothing is read by the host. On the host reading is free, so the
threshold is bracketed by a sample first, and found by partition among the few values that are left.
"""

import math

import numpy as np
import torch
from torch import Tensor

from ..core.host import on_host

SAMPLE = 1 << 14
"""Values that a sample has; an array of fewer than four times as many is sorted as a whole."""


def select(score: Tensor, candidates: Tensor, count: int, *, largest: bool) -> Tensor:
    """Exactly `count` of the candidates with the largest (or smallest) scores.

    Args:
        score: any shape, floating point; NaN is selected last, as the worst infinity is.
        candidates: bool, the same shape; at least `count` of them True.
        count: number of positions to select.
        largest: True selects the largest scores, and among equal ones the lowest flat indices; False the
            smallest, and among equal ones the highest flat indices.

    Returns:
        bool, the same shape, with `count` positions True. Flat indices are those of a contiguous tensor, whatever the
        memory format.
    """
    if count == 0:
        return torch.zeros_like(candidates)
    if on_host(score):
        return _select_on_host(score.detach(), candidates, count, largest)
    return _select_on_device(score, candidates, count, largest)


def _select_on_device(score: Tensor, candidates: Tensor, count: int, largest: bool) -> Tensor:
    flat = score.reshape(-1)
    eligible = candidates.reshape(-1)
    outside = float("-inf") if largest else float("inf")
    flat = torch.where(eligible & ~flat.isnan(), flat, outside)
    best = torch.topk(flat, count, largest=largest, sorted=False).values
    threshold = best.amin() if largest else best.amax()
    beyond = eligible & (flat > threshold if largest else flat < threshold)
    tied = eligible & (flat == threshold)
    if not largest:
        tied = tied.flip(0)
    rank = tied.cumsum(0, dtype=torch.int64)
    taken = tied & (rank <= count - beyond.sum())
    if not largest:
        taken = taken.flip(0)
    return (beyond | taken).view(candidates.shape)


def _select_on_host(score: Tensor, candidates: Tensor, count: int, largest: bool) -> Tensor:
    if score.dtype not in (torch.float32, torch.float64):
        score = score.float()
    # In the order of the memory as long as no tie has to be broken: channels_last is not copied.
    order = sorted(range(score.dim()), key=lambda dim: score.stride(dim), reverse=True)
    stored = [tensor.permute(order) for tensor in (score, candidates)]
    if all(tensor.is_contiguous() for tensor in stored):
        values, eligible = (tensor.reshape(-1).numpy() for tensor in stored)
        chosen = _chosen(values, eligible, count, largest, in_order=order == sorted(order))
        if chosen is not None:
            inverse = sorted(range(len(order)), key=order.__getitem__)
            return torch.from_numpy(chosen).view(stored[0].shape).permute(inverse)
    values, eligible = score.reshape(-1).numpy(), candidates.reshape(-1).numpy()
    chosen = _chosen(values, eligible, count, largest, in_order=True)
    return torch.from_numpy(chosen).view(candidates.shape)


def _chosen(values: np.ndarray, eligible: np.ndarray, count: int, largest: bool, in_order: bool) -> np.ndarray | None:
    """`select` of flat arrays; None where a tie is to be broken and the arrays are not in flat order."""
    worst = values.dtype.type(-np.inf if largest else np.inf)
    threshold = _bracketed(values, eligible, count, largest) if len(values) >= 4 * SAMPLE else None
    if threshold is None or threshold == worst:
        own = values[eligible]
        if np.isnan(own).any():
            values = np.where(np.isnan(values), worst, values)
            own = values[eligible]
        threshold = np.sort(own)[-count if largest else count - 1]
    chosen = values >= threshold if largest else values <= threshold
    chosen &= eligible
    excess = np.count_nonzero(chosen) - count
    if excess:
        if not in_order:
            return None
        tied = values == threshold
        tied &= eligible
        places = np.flatnonzero(tied)
        chosen[places[-excess:] if largest else places[:excess]] = False
    return chosen


def _bracketed(values: np.ndarray, eligible: np.ndarray, count: int, largest: bool) -> np.floating | None:
    """The eligible value of rank `count`; None where a sample is misleading, or there are NaN that matter.

    Values that come before the better end of the bracket are counted, those between its ends are sorted. By partition
    it would take a hundred times as long where one value dominates (numpy 2.4).
    """
    step = len(values) // SAMPLE
    while math.gcd(step, 210) > 1:  # a kernel has 9 elements, a layer a power of two: all of them have to be met
        step += 1
    sample = np.sort(values[::step][eligible[::step]])
    if not len(sample):
        return None
    share = min(count / np.count_nonzero(eligible), 1.0)
    rank = (1 - share if largest else share) * len(sample)
    spread = 2 + 4 * math.sqrt(len(sample) * share * (1 - share))  # four standard deviations
    lowest, highest = math.floor(rank - spread), math.ceil(rank + spread)
    low = sample[lowest] if lowest >= 0 else -np.inf
    high = sample[highest] if highest < len(sample) else np.inf
    if np.isnan(low) or np.isnan(high):  # they are last in the sample, whichever end is selected
        return None
    inside = values >= low if largest else values <= high
    better = values > high if largest else values < low
    inside &= eligible
    better &= eligible
    inside ^= better
    certain = np.count_nonzero(better)
    within = np.sort(values[inside])
    if not certain < count <= certain + len(within):
        return None
    return within[certain - count if largest else count - certain - 1]
