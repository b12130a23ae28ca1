"""A narrower dense model with a given number of parameters: the small-dense baseline of an arbitrary model."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..captured_module import CapturedModule
from ..core.channel_records import Atom
from ..core.errors import AllocationError
from ..core.masking import floor_count, seeded_generator
from .analysis import channel_groups
from .compaction import compact


def narrow(model: nn.Module, example_input: Any, parameters: int, seed: int = 0) -> CapturedModule:
    """The model with the same share of every group of channels removed at random, down to `parameters` parameters.

    The channels that stay keep the weights that they have. Only channels whose removal is exact go, and one of each
    group stays (`channel_groups`).

    Args:
        model, example_input: as for `channel_groups`; the model is not touched.
        parameters: number of elements of all parameters, at most; missed by less than what the next channels hold.
        seed: of the draw.

    Raises:
        AllocationError: what can be removed is not enough.
    """
    draws = []
    for group in channel_groups(model, example_input).groups:
        exact = group.with_status("exact")
        order = torch.randperm(len(exact), generator=seeded_generator(seed, "narrow", group.name)).tolist()
        draws.append([exact[index] for index in order])
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def removed(share: float) -> list[Atom]:
        return [atom for draw in draws for atom in draw[: min(floor_count(share, len(draw)), max(len(draw) - 1, 0))]]

    # The number falls in steps as the share rises: bisection over the shares at which some group loses a channel.
    shares = sorted({index / len(draw) for draw in draws for index in range(len(draw) + 1) if draw} | {0.0})
    left = count_without(shapes, removed(1.0))
    if left > parameters:
        raise AllocationError(
            f"small-dense: with all channels removed that can be, {left:,} parameters are left, more than the "
            f"{parameters:,} of the sparse model; lower the sparsity, or build a narrower model yourself"
        )
    low, high = 0, len(shares) - 1  # shares[high] is enough
    while low < high:
        middle = (low + high) // 2
        if count_without(shapes, removed(shares[middle])) <= parameters:
            high = middle
        else:
            low = middle + 1
    return compact(model, example_input, remove=removed(shares[low]))


def count_without(shapes: Mapping[str, Sequence[int]], atoms: Iterable[Atom]) -> int:
    """Number of elements of tensors with these shapes when the atoms' slices are cut away."""
    gone: dict[tuple[str, int], set[int]] = defaultdict(set)
    for atom in atoms:
        for item in atom.slices:
            gone[item.tensor, item.dim].update(item.indices)
    empty: Collection[int] = ()
    return sum(
        math.prod(side - len(gone.get((name, dim), empty)) for dim, side in enumerate(shape))
        for name, shape in shapes.items()
    )
