"""What is dropped and grown as one: single weights, whole channels, blocks of a weight; or N weights of every M.

A granularity is one class here and its line in `GRANULARITIES`. If its units lie within one weight, it gives every
weight a `UnitLayout`, and all that the runtime, the masks and the counts do goes by that; the masks themselves stay
bool tensors of the weights' shapes. If its units are single weights that are chosen group by group, it gives every
weight a `GroupLayout`: the first masks, the check of masks that come from elsewhere, and drop and grow go by that.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar, Protocol

from torch import Tensor

from .block_layout import BlockLayout
from .errors import ConfigError, SelectionError, nearest
from .group_layout import GroupLayout
from .records import WeightSite


class UnitLayout(Protocol):
    """How the elements of one weight fall into units that are active or not as one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        ...

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of a tensor that holds one value a unit."""
        ...

    @property
    def units(self) -> int:
        """Number of units."""
        ...

    @property
    def even(self) -> bool:
        """Whether all units have the full number of elements."""
        ...

    def elements(self, units: int) -> int:
        """Number of elements in so many units; where units differ in size, what it is on average, rounded."""
        ...

    def spread(self, units: Tensor) -> Tensor:
        """From one value a unit to one an element: that of its unit."""
        ...

    def gather(self, elements: Tensor) -> Tensor:
        """The other way, for values that are the same all over each unit (a mask)."""
        ...

    def mean(self, elements: Tensor) -> Tensor:
        """The mean over each unit's elements (float32 or wider)."""
        ...

    def is_whole(self, mask: Tensor) -> bool:
        """Whether a mask of the weight's shape has every unit wholly active or wholly inactive. Waits."""
        ...

    def describe(self, name: str) -> str:
        """What a person should know of the weight `name`'s units beyond the rule, or nothing."""
        ...


@dataclass(frozen=True)
class Granularity:
    """Single weights, and the base of the others.

    Attributes:
        kind: what methods list in their `granularities`.
    """

    kind: ClassVar[str] = "weight"

    def __str__(self) -> str:
        return self.kind

    @property
    def phrase(self) -> str:
        """What a report says of it; nothing where that is said elsewhere."""
        return ""

    def layout(self, site: WeightSite) -> UnitLayout | None:
        """The units of a weight; None where they are not within single weights, or are the weights.

        Raises:
            SelectionError: a weight that cannot be cut into such units.
        """
        return None

    def groups(self, site: WeightSite, exact: bool = True) -> GroupLayout | str | None:
        """The groups within which weights are chosen, or why a weight has none and stays dense; None: they are not.

        Args:
            exact: as of `GroupLayout`.
        """
        return None


@dataclass(frozen=True)
class Channels(Granularity):
    """Whole channels, which can be cut out of the graph."""

    kind: ClassVar[str] = "channel"


@dataclass(frozen=True)
class Blocks(Granularity):
    """Blocks of `rows` consecutive output channels at one input position (input channel and kernel tap).

    The blocks of a column begin at its first output channel, or at the first of each group of a grouped convolution;
    where the number is no multiple of `rows`, the last block is smaller.
    """

    kind: ClassVar[str] = "block"
    rows: int = 4

    def __str__(self) -> str:
        return f"{self.rows}x1"

    @property
    def phrase(self) -> str:
        return (
            f"granularity {self}: the weights of {self.rows} consecutive output channels at one input position are "
            "dropped and grown as one"
        )

    def layout(self, site: WeightSite) -> UnitLayout:
        if site.output_dim is None:
            raise SelectionError(
                f"granularity: which dimension of {site.name} makes its output channels is not known; exclude it, or "
                "use granularity='weight'"
            )
        return BlockLayout(site.shape, self.rows, site.output_dim, site.output_groups)


@dataclass(frozen=True)
class NofM(Granularity):
    """N of every M consecutive weights along the input dimension are active.

    For a convolution they are at one kernel tap and of M consecutive input channels of one group.
    """

    kind: ClassVar[str] = "n:m"
    keep: int = 2
    of: int = 4

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    @property
    def sparsity(self) -> float:
        """Of every weight that has such groups."""
        return (self.of - self.keep) / self.of

    @property
    def phrase(self) -> str:
        return (
            f"granularity {self}: {self.keep} of every {self.of} consecutive weights along the input dimension are "
            f"active, so that the sparsity of a weight is {self.sparsity:.4g}"
        )

    def groups(self, site: WeightSite, exact: bool = True) -> GroupLayout | str:
        if site.input_dim is None:
            return "which of its dimensions makes the input channels is not known"
        channels = site.shape[site.input_dim] // site.input_groups
        if channels % self.of:
            of_group = " in a group" if site.input_groups > 1 else ""
            return f"its {channels} input channels{of_group} are no multiple of {self.of}"
        return GroupLayout(site.shape, self.keep, self.of, site.input_dim, exact)


SINGLE_WEIGHTS = Granularity()

GRANULARITIES = {cls.kind: cls for cls in (Granularity, Channels)}
"""Those that are called by a name; blocks are called by their shape, N of M by their numbers."""


def layouts_of(granularity: Granularity, sites: Sequence[WeightSite]) -> dict[str, UnitLayout]:
    """Weight name -> its units; empty for a granularity whose units are single weights, or not within one weight."""
    layouts = {site.name: granularity.layout(site) for site in sites}
    return {name: layout for name, layout in layouts.items() if layout is not None}


def groups_of(
    granularity: Granularity, sites: Sequence[WeightSite], exact: bool = True
) -> tuple[dict[str, GroupLayout], dict[str, str]]:
    """Weight name -> the groups of which each keeps N active; and of weights that have none, why they stay dense.

    Both are empty for a granularity without groups.
    """
    found = {site.name: granularity.groups(site, exact) for site in sites}
    return (
        {name: groups for name, groups in found.items() if isinstance(groups, GroupLayout)},
        {name: reason for name, reason in found.items() if isinstance(reason, str)},
    )


def check_masks(
    masks: Mapping[str, Tensor],
    layouts: Mapping[str, UnitLayout],
    groups: Mapping[str, GroupLayout],
    granularity: Granularity,
) -> None:
    """`SelectionError` for one of some masks, by weight, that cuts units or has not N of every M. Waits."""
    for name, mask in masks.items():
        if name in layouts:
            check_units(name, mask, layouts[name], granularity)
        if name in groups:
            check_groups(name, mask, groups[name], granularity)


def check_groups(name: str, mask: Tensor, groups: GroupLayout, granularity: Granularity) -> None:
    """`SelectionError` for a mask that has not N of every M; one of another shape is left to others to refuse. Waits.

    A mask of ones passes where dense weights are being pruned.
    """
    if tuple(mask.shape) == tuple(groups.shape) and not mask.is_meta and not groups.holds(mask):
        or_more = "" if groups.exact else " or more"
        raise SelectionError(
            f"masks: that of {name} does not have {groups.keep}{or_more} active in every {groups.of} consecutive "
            f"weights along its input dimension; use granularity='weight', or masks that are {granularity}"
        )


def check_units(name: str, mask: Tensor, layout: UnitLayout, granularity: Granularity) -> None:
    """`SelectionError` for a mask that cuts units; one of another shape is left to others to refuse. Waits."""
    if tuple(mask.shape) == tuple(layout.shape) and not mask.is_meta and not layout.is_whole(mask):
        raise SelectionError(
            f"masks: that of {name} does not consist of whole blocks of {granularity}; use granularity='weight', or "
            "masks of such blocks"
        )


Given = str | Sequence[int] | Granularity


def read_granularity(given: Given) -> Granularity:
    """From what a user writes: `"weight"`, `"channel"`, `(4, 1)`, `"4x1"` or `"2:4"`; `str()` of the result reads back.

    Raises:
        ConfigError: something else, or a shape that no granularity has.
    """
    if isinstance(given, Granularity):
        return given
    if isinstance(given, str):
        if given in GRANULARITIES:
            return GRANULARITIES[given]()
        shape = re.fullmatch(r"(\d+)x(\d+)", given)
        if shape is not None:
            return _blocks(given, int(shape[1]), int(shape[2]))
        numbers = re.fullmatch(r"(\d+):(\d+)", given)
        if numbers is not None:
            return _n_of_m(given, int(numbers[1]), int(numbers[2]))
    elif isinstance(given, Sequence) and len(given) == 2 and all(_is_whole_number(side) for side in given):
        return _blocks(given, int(given[0]), int(given[1]))
    raise ConfigError(
        f"granularity: {given!r} is not one of {', '.join(GRANULARITIES)}{nearest(str(given), GRANULARITIES)}, nor the "
        "shape of blocks such as (4, 1), written 4x1 in a command, nor N of every M weights such as 2:4"
    )


def _is_whole_number(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _blocks(given: object, rows: int, columns: int) -> Blocks:
    if rows < 1 or columns != 1:
        raise ConfigError(
            f"granularity: there are no blocks of {given!r}; (r, 1) has r output channels, 1 or more, at one input "
            "position"
        )
    return Blocks(rows)


def _n_of_m(given: str, keep: int, of: int) -> NofM:
    if not 1 <= keep < of:
        raise ConfigError(f"granularity: {given!r} is not N of every M weights with 1 <= N < M, such as 2:4")
    return NofM(keep, of)
