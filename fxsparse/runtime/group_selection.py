"""Drop and grow where every group of M weights keeps N active: what `Method._drop_and_grow` does at such a site.

Which weights go is decided over the whole site, as for single weights; which come is decided within every group, as
many as it lost. Counts are tensors: nothing waits for the device, and no shape depends on values.
"""

from collections.abc import Callable

from torch import Tensor

from ..core.group_layout import GroupLayout
from .selection import select


def keep_in_groups(score: Tensor, mask: Tensor, drop: int, groups: GroupLayout, can_lose: int) -> Tensor:
    """`mask` without its `drop` active weights of least `score`, at most `can_lose` of a group of N.

    Args:
        score: floating point, the weight's shape.
        can_lose: N for a rewiring. A group that has more than N active weights (pruning from dense) loses those beyond
            N in any case: with `can_lose` 0, those alone.

    Returns:
        bool, the weight's shape. Ties go to the highest flat index dropped first, and in a group to the highest index.
    """
    candidates = mask
    if not groups.exact or can_lose < groups.keep:
        candidates = mask & (groups.ranks(score, mask) >= groups.keep - can_lose)
    return mask & ~select(score, candidates, drop, largest=False)


def grow_in_groups(score: Tensor, free: Tensor, lost: Tensor, groups: GroupLayout) -> Tensor:
    """In each group as many of the `free` positions as it `lost`, those of largest `score`.

    Args:
        score: floating point, the weight's shape; NaN is grown last.
        free: bool, the weight's shape: the positions that may grow; no fewer in a group than it lost.
        lost: bool, the weight's shape: the positions that were dropped.

    Returns:
        bool, the weight's shape. Ties go to the lowest index in a group.
    """
    wanted = groups.counts(lost)
    return groups.join(groups.split(free) & (groups.split(groups.ranks(score, free)) < wanted))


def rewire_in_groups(
    drop_score: Tensor,
    grow_score: Callable[[], Tensor],
    mask: Tensor,
    drop: int,
    grow: int,
    groups: GroupLayout,
    regrows: bool,
) -> tuple[Tensor, Tensor]:
    """One rewiring: `drop` weights go, and if `grow` is not 0 every group gets back as many as it lost.

    Args:
        grow_score: gives the score to grow by, where one is needed.
        regrows: whether a weight that was just dropped may grow again. If not, a group loses no more weights than it
            has inactive positions.

    Returns:
        The new mask, and the weights that were kept (both bool, the weight's shape).
    """
    assert grow in (0, drop), "weights do not move between the groups"
    if drop == 0:
        return mask, mask
    if grow == 0:
        kept = keep_in_groups(drop_score, mask, drop, groups, 0)
        return kept, kept
    can_lose = groups.keep if regrows else min(groups.keep, groups.of - groups.keep)
    kept = keep_in_groups(drop_score, mask, drop, groups, can_lose)
    free = ~kept if regrows else ~mask
    return kept | grow_in_groups(grow_score(), free, mask & ~kept, groups), kept
