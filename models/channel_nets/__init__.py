"""Small networks that are each hard to shrink for one reason, which the name gives.

`CHANNEL_NETS` maps a name to a function that makes the network; `example_of` gives an input for it. `TRAPS` are
networks on images in which something has to stay, or almost.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .images import IMAGE_NETS
from .net import Net
from .sequences import SEQUENCE_NETS
from .traps import TRAPS

CHANNEL_NETS: dict[str, Callable[[], Net]] = IMAGE_NETS | SEQUENCE_NETS


def example_of(name: str, batch: int = 2, seed: int = 0) -> Tensor:
    """An input for a network."""
    shape = (3, 12, 12) if name not in SEQUENCE_NETS else (7, 16)
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


__all__ = ["CHANNEL_NETS", "IMAGE_NETS", "SEQUENCE_NETS", "TRAPS", "Net", "example_of"]
