"""`SparsePattern`: which positions of a weight are stored, in the form that the kernels read.

The weight is flattened to a matrix, one row an output channel. Positions are kept as compressed sparse rows of blocks:
a block is `block` consecutive output channels at one input position (1 for single weights). For the gradient of the
input the same blocks are listed column by column.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import InputError

_LIMIT = 2**31


@dataclass(frozen=True)
class SparsePattern:
    """Positions of a weight of a given shape. All tensors are int32, on the CPU.

    Attributes:
        shape: of the dense weight, `(out, in per group, *kernel)`.
        groups: of the convolution.
        block: output channels in a block.
        starts: (out / block + 1): where the blocks of each row of blocks start.
        columns: (blocks): flattened input position of each block, ascending in a row.
        t_starts: (groups * row length + 1): where the blocks of each column of each group start, listed by columns.
        t_rows: (blocks): row of blocks of each block, listed by columns.
        t_places: (blocks): its place in the order of rows.
    """

    shape: tuple[int, ...]
    groups: int
    block: int
    starts: Tensor
    columns: Tensor
    t_starts: Tensor
    t_rows: Tensor
    t_places: Tensor

    @classmethod
    def of(cls, mask: Tensor, groups: int = 1, block: int = 1) -> "SparsePattern":
        """The pattern of a mask (bool, the weight's shape).

        Raises:
            InputError: blocks that do not divide the output channels of a group, that are not masked as one, or a
                weight whose active positions an int32 cannot count.
        """
        out = mask.shape[0]
        if out % (groups * block):
            raise InputError(f"blocks of {block} do not divide {out} output channels in {groups} groups")
        whole = mask.detach().cpu().reshape(out // block, block, math.prod(mask.shape[1:]))
        rows = whole.any(1)
        if block > 1 and not torch.equal(whole, rows.unsqueeze(1).expand_as(whole)):
            raise InputError(f"a block of {block} output channels is masked in part")
        if mask.numel() >= _LIMIT:
            raise InputError(f"a weight of {mask.numel():,} elements has more positions than an int32 counts")
        length = rows.shape[1]
        at = rows.flatten().nonzero().squeeze(1)
        row, column = at // max(length, 1), at % max(length, 1)
        key = row // (rows.shape[0] // groups) * length + column if out else at
        places = torch.argsort(key, stable=True)
        return cls(
            tuple(mask.shape),
            groups,
            block,
            _starts(rows.sum(1)),
            column.int(),
            _starts(torch.bincount(key, minlength=groups * length)),
            row[places].int(),
            places.int(),
        )

    @property
    def tensors(self) -> list[Tensor]:
        """What the operators take."""
        return [self.starts, self.columns, self.t_starts, self.t_rows, self.t_places]

    @property
    def count(self) -> int:
        """Number of stored weights."""
        return self.columns.numel() * self.block

    @property
    def nbytes(self) -> int:
        """Bytes of the pattern itself."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def indices(self) -> Tensor:
        """(count), int64: flat index in the weight of each stored one, in the order of the values."""
        rows = torch.repeat_interleave(torch.arange(len(self.starts) - 1), self.starts.diff().long())
        within = torch.arange(self.block)
        length = (self.t_starts.numel() - 1) // self.groups
        return ((rows[:, None] * self.block + within) * length + self.columns.long()[:, None]).flatten()

    def mask(self) -> Tensor:
        """The mask (bool, the weight's shape)."""
        mask = torch.zeros(self.shape, dtype=torch.bool)
        mask.view(-1)[self.indices()] = True
        return mask

    def gather(self, dense: Tensor) -> Tensor:
        """(count): the stored positions of a tensor of the weight's shape."""
        return dense.reshape(-1)[self.indices()]

    def move(self, values: Tensor, other: "SparsePattern") -> Tensor:
        """Values in the order of another pattern of the same shape, 0 where they have no place in this one."""
        mine, order = self.indices().sort()
        theirs = other.indices()
        at = torch.searchsorted(mine, theirs).clamp(max=max(len(mine) - 1, 0))
        moved = values.new_zeros(len(theirs))
        if len(mine):
            both = mine[at] == theirs
            moved[both] = values[order[at[both]]]
        return moved

    def scatter(self, values: Tensor) -> Tensor:
        """A tensor of the weight's shape with `values` (count) at the stored positions, and 0 elsewhere."""
        dense = values.new_zeros(self.shape)
        dense.view(-1)[self.indices()] = values
        return dense


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
