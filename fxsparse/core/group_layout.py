"""`GroupLayout`: a weight as groups of M consecutive weights along its input channels, of which N are active."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupLayout:
    """Groups of `of` indices along the dimension of the input channels, one index along all others.

    Nothing is moved in memory: a tensor of the weight's shape, whatever its strides, is seen with that dimension split
    in two (groups, and places within a group), so all that is computed here keeps the weight's own layout.

    Attributes:
        shape: of the weight.
        keep: N, the active weights of a group.
        of: M, the weights in a group; it divides the size of `dim`, within every group of a grouped convolution.
        dim: the dimension of the input channels.
        exact: whether a group has N active weights at any time; otherwise N or more, as while a dense weight is
            pruned to N.
    """

    shape: tuple[int, ...]
    keep: int
    of: int
    dim: int = 1
    exact: bool = True

    @property
    def axis(self) -> int:
        """Of a tensor that `split` gave: the one over the places within a group."""
        return self.dim + 1

    @property
    def groups(self) -> int:
        """Number of groups."""
        return prod(self.shape) // self.of

    def split(self, values: Tensor) -> Tensor:
        """A view of shape (..., groups along `dim`, M, ...)."""
        return values.unflatten(self.dim, (-1, self.of))

    def join(self, values: Tensor) -> Tensor:
        """The way back."""
        return values.flatten(self.dim, self.dim + 1)

    def counts(self, mask: Tensor) -> Tensor:
        """Number of True in each group: int64, (..., groups along `dim`, 1, ...)."""
        return self.split(mask).sum(self.axis, keepdim=True)

    def ranks(self, score: Tensor, candidates: Tensor) -> Tensor:
        """The place of each candidate among those of its group, the largest score 0; others have no meaning.

        Ties go to the lowest index along `dim`; NaN comes last. It compares every place with every other: no sort, no
        shape that depends on values, and nothing is read on the host.

        Args:
            score: floating point, of the weight's shape.
            candidates: bool, of the weight's shape.

        Returns:
            int16 (of the weight's shape).
        """
        scores = self.split(torch.where(candidates & ~score.isnan(), score, float("-inf")))
        eligible = self.split(candidates)
        ranks = torch.zeros_like(scores, dtype=torch.int16)
        for place in range(self.of - 1):  # each with all later ones, before which it goes if they are equal
            later = (self.axis, place + 1, self.of - 1 - place)
            first = scores.narrow(self.axis, place, 1) >= scores.narrow(*later)
            ranks.narrow(*later).add_(first & eligible.narrow(self.axis, place, 1))
            behind = (~first & eligible.narrow(*later)).sum(self.axis, keepdim=True, dtype=torch.int16)
            ranks.narrow(self.axis, place, 1).add_(behind)
        return self.join(ranks)

    def draw(self, lottery: Tensor) -> Tensor:
        """The mask (bool) that keeps the N largest of each group of a tensor of random numbers."""
        return self.ranks(lottery, torch.ones_like(lottery, dtype=torch.bool)) < self.keep

    def random_mask(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """A mask (bool) of the weight, N of every group drawn without replacement; on its device (meta: no values).

        The draw is on the CPU, so that it is the same on every device.
        """
        if weight.is_meta:
            return torch.empty(self.shape, dtype=torch.bool, device="meta")
        return self.draw(torch.rand(self.shape, generator=generator, dtype=torch.float64)).to(weight.device)

    def holds(self, mask: Tensor) -> bool:
        """Whether every group of a mask has its N active weights (or more, where it is not `exact`). Waits."""
        counts = self.counts(mask)
        return bool(((counts == self.keep) if self.exact else (counts >= self.keep)).all())
