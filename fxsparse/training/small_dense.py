"""The small-dense baseline: the same network with every width scaled down to as many parameters as a sparse one.

Evci et al. 2020, section 4 ("Small-Dense"): a dense network with the parameter count of the sparse one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fxsparse.core.errors import ConfigError

Build = Callable[[float], nn.Module]
"""Width -> the network of that width."""


def matching_width(build: Build, full: float, wanted: int) -> float:
    """The largest width up to `full` whose network has at most `wanted` parameters, to a part in a thousand.

    Raises:
        ConfigError: even the narrowest network has more.
    """
    low, high = 0.0, full
    while high - low > full / 2000:
        middle = (low + high) / 2
        if _parameters(build, middle) <= wanted:
            low = middle
        else:
            high = middle
    if low == 0.0:
        raise ConfigError(
            f"small-dense: even the narrowest network has {_parameters(build, high):,} parameters, more than the "
            f"{wanted:,} of the sparse one; lower the sparsity"
        )
    return low


def _parameters(build: Build, width: float) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(width).parameters())
