"""`SparsePattern`: which positions of a weight are stored, in the form that the kernels read.

The weight is flattened to a matrix, one row an output channel. Positions are kept as compressed sparse rows of blocks:
a block is `block` consecutive output channels at one input position (1 for single weights). For the gradient of the
input the same blocks are listed column by column.
"""

import math
from dataclasses import InitVar, dataclass

import torch
from torch import Tensor

from ..core.errors import InputError

_LIMIT = 2**31
_CHUNK = 2**20


@dataclass(frozen=True)
class SparsePattern:
    """Positions of a weight of a given shape. All tensors are int32, on the CPU.

    What a file or a caller gives is looked through: the kernels read memory by it.

    Attributes:
        shape: of the dense weight, `(out, in per group, *kernel)`.
        groups: of the convolution.
        block: output channels in a block.
        starts: (out / block + 1): where the blocks of each row of blocks start.
        columns: (blocks): flattened input position of each block, ascending in a row.
        t_starts: (groups * row length + 1): where the blocks of each column of each group start, listed by columns.
        t_rows: (blocks): row of blocks of each block, listed by columns.
        t_places: (blocks): its place in the order of rows.
        check: whether to look through all of it, which raises `InputError`; not for what was made from a mask or rows.

    Raises:
        InputError: the tensors are not such a pattern.
    """

    shape: tuple[int, ...]
    groups: int
    block: int
    starts: Tensor
    columns: Tensor
    t_starts: Tensor
    t_rows: Tensor
    t_places: Tensor
    check: InitVar[bool] = True

    def __post_init__(self, check: bool) -> None:
        if check and (problem := self._problem()):
            raise InputError(f"not a pattern of a weight of shape {tuple(self.shape)}: {problem}")

    def _problem(self) -> str | None:
        if len(self.shape) < 2 or self.block < 1 or self.groups < 1 or self.shape[0] % (self.groups * self.block):
            return f"{self.groups} groups of blocks of {self.block}"
        for part in self.tensors:
            if part.dtype != torch.int32 or part.dim() != 1 or part.device.type != "cpu" or not part.is_contiguous():
                return f"expected contiguous rows of int32 on the CPU, got {part.dtype} {tuple(part.shape)}"
        rows, length, count = self.shape[0] // self.block, math.prod(self.shape[1:]), len(self.columns)
        if not (_is_starts(self.starts, rows, count) and _is_starts(self.t_starts, self.groups * length, count)):
            return f"its rows or columns do not start in order between 0 and {count}"
        if len(self.t_rows) != count or len(self.t_places) != count:
            return f"it lists {count} blocks by rows, {len(self.t_rows)} and {len(self.t_places)} by columns"
        row = _repeated(self.starts)
        if count and not 0 <= int(self.columns.min()) <= int(self.columns.max()) < length:
            return f"columns outside of rows of {length} positions"
        if bool(((self.columns.diff() <= 0) & (row.diff() == 0)).any()):
            return "columns that do not ascend in their row"
        if count and not 0 <= int(self.t_places.min()) <= int(self.t_places.max()) < count:
            return f"places outside of {count} blocks"
        key = row // max(rows // self.groups, 1)
        key.mul_(length).add_(self.columns)
        by_column = _repeated(self.t_starts)
        for at in range(0, count, _CHUNK):  # gathering makes int64 indices of the places
            chunk = slice(at, at + _CHUNK)
            places = self.t_places[chunk]
            if not torch.equal(row[places], self.t_rows[chunk]) or not torch.equal(key[places], by_column[chunk]):
                return "the lists by rows and by columns hold other positions"
        return None

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
        length = math.prod(mask.shape[1:])
        whole = mask.detach().cpu().reshape(out // block, block, length)
        rows = whole.any(1)
        if block > 1 and not torch.equal(whole, rows.unsqueeze(1).expand_as(whole)):
            raise InputError(f"a block of {block} output channels is masked in part")
        if mask.numel() >= _LIMIT:
            raise InputError(f"a weight of {mask.numel():,} elements has more positions than an int32 counts")
        at = rows.flatten().nonzero().squeeze(1)
        return cls.of_rows(tuple(mask.shape), groups, block, _starts(rows.sum(1)), at % max(length, 1))

    @classmethod
    def of_rows(
        cls, shape: tuple[int, ...], groups: int, block: int, starts: Tensor, columns: Tensor
    ) -> "SparsePattern":
        """The pattern of compressed rows that are known to be right; nothing of the weight's size is made.

        Args:
            starts: (out / block + 1): where the blocks of each row of blocks start.
            columns: (blocks): flattened input position of each block, ascending in a row.

        Raises:
            InputError: blocks that do not divide the output channels of a group.
        """
        if shape[0] % (groups * block):
            raise InputError(f"blocks of {block} do not divide {shape[0]} output channels in {groups} groups")
        length, rows = math.prod(shape[1:]), shape[0] // block
        starts, columns = starts.int(), columns.int()  # as few bytes as do: this is the peak of loading
        row = _repeated(starts)
        key = columns if groups == 1 else row // max(rows // groups, 1) * length + columns
        t_starts = _starts(torch.bincount(key, minlength=groups * length))
        places = torch.argsort(key, stable=True)
        return cls(tuple(shape), groups, block, starts, columns, t_starts, row[places], places.int(), check=False)

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


def _is_starts(starts: Tensor, rows: int, count: int) -> bool:
    inside = len(starts) == rows + 1 and int(starts[0]) == 0 and int(starts[-1]) == count
    return inside and bool((starts.diff() >= 0).all())


def _repeated(starts: Tensor) -> Tensor:
    """Of each entry the row in which it is; int32, as temporaries of large patterns count."""
    return torch.repeat_interleave(torch.arange(len(starts) - 1, dtype=torch.int32), starts.diff())


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
