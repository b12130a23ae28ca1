"""`BlockLayout`: a weight as blocks of consecutive output channels at one input position."""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class BlockLayout:
    """Blocks of `rows` indices along the dimension of the output channels, one index along all others.

    Blocks begin anew in every group. The last one of a group has what is left, so it may be smaller. A tensor with one
    value a block has the weight's shape but for `dim`, where it has the number of blocks; with `rows` 1 the two
    shapes are the same, and so is the flat order.

    Attributes:
        shape: of the weight.
        rows: output channels in a block.
        dim: the dimension of the output channels.
        groups: into how many equal parts that dimension falls, which no block crosses.
    """

    shape: tuple[int, ...]
    rows: int
    dim: int = 0
    groups: int = 1

    @property
    def channels(self) -> int:
        """Output channels in a group."""
        return self.shape[self.dim] // self.groups

    @property
    def step(self) -> int:
        """Output channels from the beginning of one block to that of the next."""
        return min(self.rows, self.channels)

    @property
    def blocks(self) -> int:
        """Blocks along the output channels of a group."""
        return -(-self.channels // self.step)

    @property
    def last(self) -> int:
        """Output channels in the last block of a group."""
        return self.channels - (self.blocks - 1) * self.step

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of a tensor with one value a block."""
        return (*self.shape[: self.dim], self.groups * self.blocks, *self.shape[self.dim + 1 :])

    @cached_property
    def units(self) -> int:
        """Number of blocks."""
        return prod(self.grid)

    @property
    def even(self) -> bool:
        """Whether all blocks have `rows` elements."""
        return self.last == self.rows

    def elements(self, units: int) -> int:
        """Weights in so many blocks: `units * rows`; where the last ones are smaller the average, rounded."""
        return (2 * units * prod(self.shape) + self.units) // (2 * self.units)

    def spread(self, units: Tensor) -> Tensor:
        """From one value a block to one a weight: that of its block."""
        grouped = units.unflatten(self.dim, (self.groups, self.blocks)).repeat_interleave(self.step, self.dim + 1)
        return grouped.narrow(self.dim + 1, 0, self.channels).flatten(self.dim, self.dim + 1)

    def gather(self, elements: Tensor) -> Tensor:
        """From one value a weight, the same all over each block, to one a block."""
        grouped = elements.unflatten(self.dim, (self.groups, self.channels))
        firsts = (*[slice(None)] * (self.dim + 1), slice(None, None, self.step))
        return grouped[firsts].flatten(self.dim, self.dim + 1)

    def mean(self, elements: Tensor) -> Tensor:
        """The mean over each block's own elements, in float32 or wider.

        Summed in the order of the rows, on every device alike, so that replicas agree on ties.
        """
        wide = elements.to(torch.promote_types(elements.dtype, torch.float32))
        grouped = wide.unflatten(self.dim, (self.groups, self.channels)).movedim(self.dim + 1, -1)
        padded = F.pad(grouped, (0, self.step - self.last)).unflatten(-1, (self.blocks, self.step))
        sizes = torch.full((self.blocks,), self.step, dtype=wide.dtype, device=wide.device)
        sizes[-1] = self.last
        total = padded[..., 0].clone()
        for row in range(1, self.step):
            total += padded[..., row]
        return (total / sizes).movedim(-1, self.dim + 1).flatten(self.dim, self.dim + 1)

    def is_whole(self, mask: Tensor) -> bool:
        """Whether every block of a mask is wholly active or wholly inactive. Waits for the device."""
        return torch.equal(self.spread(self.gather(mask)), mask)

    def describe(self, name: str) -> str:
        """A line on smaller blocks, where there are any."""
        if self.even:
            return ""
        of_group = f" in each of {self.groups} groups" if self.groups > 1 else ""
        sizes = f"{self.last}" if self.blocks == 1 else f"{self.blocks - 1} x {self.rows} + {self.last}"
        return f"{name} has {self.channels} output channels{of_group}: blocks of {sizes}"
