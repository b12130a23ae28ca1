"""The drop and grow rules, as pure functions on tensors.

All of them select an exact number of positions, known in advance, and on a device without looking at a value on the
host. Ties are broken by flat index, so the result does not depend on the algorithm, the device or the number of
threads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .selection import select


def drop_smallest(weight: Tensor, mask: Tensor, k: int) -> Tensor:
    """`mask` without its k active weights of least magnitude (paper, Algorithm 1: `ArgTopK(-|theta|, k)`).

    Ties go to the highest flat index dropped first. Shapes: all alike; returns bool.
    """
    return mask & ~select(weight.abs(), mask, k, largest=False)


def grow_largest(score: Tensor, kept: Tensor, k: int) -> Tensor:
    """`kept` plus the k inactive positions of largest `score`; ties go to the lowest flat index."""
    return kept | select(score, ~kept, k, largest=True)


def rigl_update(weight: Tensor, grad: Tensor, mask: Tensor, k: int) -> Tensor:
    """RigL: drop the k smallest weights, grow the k largest gradients (Evci et al. 2020, Algorithm 1).

    A position dropped here may grow straight back: it then stands in both masks and its weight is left
    untouched by the runtime.

    Args:
        weight: any shape; only magnitudes where `mask` is True matter.
        grad: the dense gradient with respect to the masked weight, the same shape, finite.
        mask: bool, the same shape.
        k: number of connections to drop and to grow, at most the number of active ones.

    Returns:
        The new mask: bool, the same shape and the same number of active positions.
    """
    return grow_largest(grad.abs(), drop_smallest(weight, mask, k), k)


def set_update(weight: Tensor, mask: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """SET: drop the k smallest weights, grow k inactive positions at random (Mocanu et al. 2018).

    Args:
        generator: a CPU generator; the draw happens on the CPU, so that it is the same on every device
            and, with the same seed, on every rank.

    Returns:
        The new mask: bool, the weight's shape and the same number of active positions.
    """
    return grow_largest(lottery(mask.shape, generator, mask.device), drop_smallest(weight, mask, k), k)


def lottery(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    """A random number in [0, 1) for each position (float64): the largest of them are a fair draw.

    `generator` is one of the CPU. A CUDA device fetches the numbers from pinned memory, so that the host goes on.
    """
    fetched = device.type == "cuda"
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64, pin_memory=fetched)
    return drawn.to(device, non_blocking=fetched)


def snip_score(weight: Tensor, gradient: Tensor) -> Tensor:
    """SNIP's connection sensitivity `|w * grad|` (Lee et al. 2019, equation 5, before normalisation)."""
    wide = torch.promote_types(weight.dtype, torch.float32)  # the product of two small halves is 0
    return (weight.to(wide) * gradient.to(wide)).abs()


def select_across(scores: Sequence[Tensor], candidates: Sequence[Tensor], count: int) -> list[Tensor]:
    """`select` with one ranking over several tensors: the `count` largest scores of all of them.

    Ties go to the earlier tensor, then to the lower flat index. Returns bool tensors of the scores' shapes.
    """
    joined = torch.cat([score.reshape(-1).to(torch.float64) for score in scores])
    eligible = torch.cat([mask.reshape(-1) for mask in candidates])
    parts = select(joined, eligible, count, largest=True).split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def deepr_walk(weight: Tensor, sign: Tensor, noise: Tensor, *, drift: float, spread: float) -> Tensor:
    """Deep rewiring's step beside the gradient's (Bellec et al. 2018, Algorithm 1).

    Of the connection strength `theta = sign * weight`: `theta - drift + spread * noise`, with `drift = lr alpha` and
    `spread = sqrt(2 lr T)`.

    Args:
        weight, sign, noise: alike in shape; `sign` is 1 or -1, `noise` standard normal.

    Returns:
        The weights after the step; one whose product with its sign is negative is to be retired.
    """
    return weight + sign * (spread * noise - drift)
