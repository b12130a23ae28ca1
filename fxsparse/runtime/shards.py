"""How a site's tensors lie over the ranks: whole on each, or cut along their first dimension.

What methods and rewirings choose, draw and count goes through `site.shards`, so that they see one site where there are
parts of it. With `WHOLE` that costs nothing.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .selection import select
from .sharded_selection import select_over_ranks
from .update_rules import lottery


class Whole:
    """A site that this process holds whole. Replicas that take the same decisions each by itself are whole too."""

    def select(self, score: Tensor, candidates: Tensor, count: int, *, largest: bool) -> Tensor:
        """`selection.select` among all positions of the site."""
        return select(score, candidates, count, largest=largest)

    def lottery(self, mask: Tensor, generator: torch.Generator) -> Tensor:
        """`update_rules.lottery` for the positions of a mask, on its device."""
        return lottery(mask.shape, generator, mask.device)

    def add_up(self, values: Tensor) -> Tensor:
        """From this process's numbers to those of the whole site."""
        return values

    def norms(self, norms: Tensor) -> Tensor:
        """From the 2-norms of parts to those of the whole."""
        return norms

    def everywhere(self, flag: bool | Tensor) -> bool | Tensor:
        """Whether a flag (known, or bool and 0-dim on the device) is True of every part; in the same form."""
        return flag

    def part(self, whole: Tensor) -> Tensor:
        """What this process holds of a unit tensor of the whole site."""
        return whole

    def whole(self, part: Tensor) -> Tensor:
        """The other way."""
        return part


WHOLE = Whole()


class Shards(Whole):
    """A site cut along its first dimension, the ranks of a process group holding the parts in their order.

    Every method is a collective: all ranks of the group have to call it.
    """

    def __init__(self, group: Any, shape: torch.Size) -> None:
        """`shape` is that of the whole site; each rank holds `ceil(rows / ranks)` of its rows, the last ones fewer."""
        self.group = group
        self.shape = shape
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        step = -(-shape[0] // self.ranks)
        self.start, self.stop = (min(rank * step, shape[0]) for rank in (self.rank, self.rank + 1))

    def select(self, score: Tensor, candidates: Tensor, count: int, *, largest: bool) -> Tensor:
        return select_over_ranks(
            score, candidates, count, largest=largest, add_up=self.add_up, before=self._before_this_rank
        )

    def lottery(self, mask: Tensor, generator: torch.Generator) -> Tensor:
        drawn = lottery(self.shape, generator, torch.device("cpu"))  # whole: the numbers are those of one process
        return self.part(drawn).to(mask.device)

    def add_up(self, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def norms(self, norms: Tensor) -> Tensor:
        return self.add_up(norms.double().square()).sqrt().to(norms.dtype)

    def everywhere(self, flag: bool | Tensor) -> bool | Tensor:
        if isinstance(flag, Tensor):
            return self.add_up((~flag).to(torch.int64)) == 0
        return int(self.add_up(torch.tensor(int(not flag)))) == 0

    def part(self, whole: Tensor) -> Tensor:
        return whole[self.start : self.stop]

    def whole(self, part: Tensor) -> Tensor:
        total = torch.zeros(self.shape, dtype=torch.uint8, device=part.device)
        total[self.start : self.stop] = part
        dist.all_reduce(total, group=self.group)
        return total.to(part.dtype)

    def _before_this_rank(self, value: Tensor, after: bool) -> Tensor:
        """The sum of a number over the ranks before this one, or after it."""
        each = torch.zeros(self.ranks, dtype=value.dtype, device=value.device)
        each[self.rank] = value
        dist.all_reduce(each, group=self.group)
        return (each[self.rank + 1 :] if after else each[: self.rank]).sum()
