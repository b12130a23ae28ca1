"""The small-dense baseline: the same network with every width scaled down to as many parameters as a sparse one.

Evci et al. 2020, section 4 ("Small-Dense"): a dense network with the parameter count of the sparse one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import fxsparse
from fxsparse.core.errors import ConfigError
from fxsparse.core.masking import floor_count

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


def sparse_parameters(model: nn.Module, example: Any, options: Mapping[str, Any]) -> int:
    """How many parameters the sparse network would have: the active weights and all that has no mask.

    Args:
        model: at full width.
        options: of `sparsify`: `sparsity` or `flops`, `distribution`, `include`, `exclude`, `dense`.
    """
    sparse = fxsparse.sparsify(model, example, "static", verify=False, **options)
    removed = sum(floor_count(sparse.target_sparsities[site.name], site.numel) for site in sparse.sites)
    return sum(parameter.numel() for parameter in sparse.parameters()) - removed


def _parameters(build: Build, width: float) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(width).parameters())
