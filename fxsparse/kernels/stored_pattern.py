"""Patterns that come from elsewhere, as rows of columns: checked, since the kernels check nothing, and never dense."""

import math

import torch
from torch import Tensor

from ..core.errors import InputError

_LIMIT = 2**31


def check_rows(shape: tuple[int, ...], block: int, starts: Tensor, columns: Tensor) -> None:
    """Refuses what is not a pattern.

    Args:
        shape: of the dense weight.
        block: output channels in a block.
        starts: (out / block + 1): where the blocks of each row of blocks start.
        columns: (blocks): flattened input position of each.

    Raises:
        InputError: what is wrong.
    """
    if not shape or block < 1 or shape[0] % block:
        raise InputError(f"blocks of {block} do not divide the {shape[0] if shape else 0} rows of a weight of {shape}")
    rows, length = shape[0] // block, math.prod(shape[1:])
    if math.prod(shape) >= _LIMIT:
        raise InputError(f"a weight of {math.prod(shape):,} elements has more positions than an int32 counts")
    if starts.shape != (rows + 1,) or columns.dim() != 1:
        raise InputError(f"a pattern of {starts.numel() - 1} rows is not one of {rows}")
    counts = starts.diff()
    if int(starts[0]) != 0 or int(starts[-1]) != columns.numel() or bool((counts < 0).any()):
        raise InputError("the rows of a pattern do not add up to its positions")
    if columns.numel() and (int(columns.min()) < 0 or int(columns.max()) >= length):
        raise InputError(f"a pattern has position {int(columns.max())} in rows of {length}")
    ascending = columns[1:] > columns[:-1]
    first = starts[1:-1].long()
    first = first[(first > 0) & (first < columns.numel())]
    ascending[first - 1] = True  # another row begins
    if not bool(ascending.all()):
        raise InputError("the positions in a row of a pattern do not ascend")


def with_blocks(rows: tuple[Tensor, Tensor], before: int, after: int) -> tuple[Tensor, Tensor]:
    """`(starts, columns)` in blocks of another size.

    Raises:
        InputError: rows that a block would share have other positions.
    """
    starts, columns = rows
    if before == after:
        return rows
    counts = starts.diff().long()
    if before > 1:  # every row by itself
        own = torch.repeat_interleave(torch.arange(len(counts)), before)
        starts = torch.cat([counts.new_zeros(1), counts[own].cumsum(0)])
        at = torch.arange(int(starts[-1])) - torch.repeat_interleave(starts[:-1], counts[own])
        columns = columns[at + torch.repeat_interleave(rows[0][:-1].long()[own], counts[own])]
        counts = counts[own]
    if after == 1:
        return starts, columns
    if len(counts) % after or bool((counts.view(-1, after) != counts.view(-1, after)[:, :1]).any()):
        raise InputError(f"the rows do not share positions in blocks of {after}")
    parts = [torch.repeat_interleave(torch.arange(len(counts)) % after == turn, counts) for turn in range(after)]
    first = columns[parts[0]]
    if not all(torch.equal(first, columns[part]) for part in parts[1:]):
        raise InputError(f"the rows do not share positions in blocks of {after}")
    shared = counts.view(-1, after)[:, 0]
    return torch.cat([shared.new_zeros(1), shared.cumsum(0)]), first
