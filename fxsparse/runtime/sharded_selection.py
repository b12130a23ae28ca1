"""`select` over a tensor of which every rank holds a part: exact, and the same answer as on one process.

A floating-point number is turned into an integer that is ordered as it. The threshold is then found digit by digit,
from the highest: each rank counts how often each value of the digit occurs among its candidates, the counts are added
up over the ranks, and the digit in which the `count`-th candidate lies is the threshold's. 11 bits a round make three
rounds for 32 bits, and 16 KiB of traffic each, whatever the size of the tensor. Ties are resolved by how many of them
the ranks before hold. No value is looked at on the host, and every rank decides by the same sums.
"""

from collections.abc import Callable

import torch
from torch import Tensor

DIGIT = 11
"""Bits of a digit."""

Reduce = Callable[[Tensor], Tensor]


def select_over_ranks(
    score: Tensor,
    candidates: Tensor,
    count: int,
    *,
    largest: bool,
    add_up: Reduce,
    before: Callable[[Tensor, bool], Tensor],
) -> Tensor:
    """This rank's part of `selection.select` over all ranks' parts, joined in the order of their ranks.

    Args:
        score, candidates, count, largest: as of `select`, `score` and `candidates` this rank's parts (alike in shape,
            perhaps empty) and `count` of the whole; every rank calls, with the same `count` and `largest`.
        add_up: the sum of a tensor over all ranks.
        before: the sum of a 0-dim tensor over the ranks before this one; with True, over those after it.

    Returns:
        bool, the shape of this rank's part.
    """
    if count == 0:
        return torch.zeros_like(candidates)
    eligible = candidates.reshape(-1)
    key, bits = _ordered(score.reshape(-1), largest)
    missing = torch.full((), count, dtype=torch.int64, device=key.device)
    beyond = torch.zeros_like(eligible)
    tied = eligible  # with the threshold, in the digits so far
    for shift in range((bits - 1) // DIGIT * DIGIT, -1, -DIGIT):
        digit = _digit(key, shift, bits)
        counts = torch.zeros(1 << DIGIT, dtype=torch.int64, device=key.device)
        up_to = add_up(counts.scatter_add_(0, digit, tied.to(torch.int64))).cumsum(0)  # digits up to each value
        place = (up_to < missing).sum()
        missing = missing - torch.where(up_to < missing, up_to, 0).amax()
        beyond = beyond | (tied & (digit < place))
        tied = tied & (digit == place)
    own = tied.sum()
    if not largest:
        tied = tied.flip(0)
    taken = tied & (tied.cumsum(0, dtype=torch.int64) <= missing - before(own, not largest))
    if not largest:
        taken = taken.flip(0)
    return (beyond | taken).view(candidates.shape)


def _ordered(score: Tensor, largest: bool) -> tuple[Tensor, int]:
    """Integers, signed, that are the smaller the earlier a score is to be selected, and their number of bits."""
    wide = score if score.dtype == torch.float64 else score.to(torch.float32)
    worst = float("-inf") if largest else float("inf")
    # There is one zero here, and NaN goes with what is selected last.
    number = torch.where(wide.isnan(), worst, wide) + 0.0
    bits = number.element_size() * 8
    raw = number.view(torch.int64 if bits == 64 else torch.int32)
    key = torch.where(raw < 0, raw ^ torch.iinfo(raw.dtype).max, raw)  # the order of negative numbers is the other
    return (~key if largest else key), bits


def _digit(key: Tensor, shift: int, bits: int) -> Tensor:
    """The digit that begins at bit `shift`, 0 to `2 ** DIGIT - 1`, of signed integers of so many bits."""
    digit = key >> shift
    if shift + DIGIT >= bits:  # the sign is in it: from the least number on
        return (digit + (1 << (bits - 1 - shift))).to(torch.int64)
    return (digit & ((1 << DIGIT) - 1)).to(torch.int64)
