"""How many connections each layer regrows when densities move: exact counts from real-valued shares."""

import math
from collections.abc import Sequence

from ..core.errors import ConfigError, nearest

REDISTRIBUTIONS = ("none", "gradient", "momentum")
"""What a layer's share of the regrowth may go by: the mean magnitude of its active weights' gradient or momentum. With
"none" every layer regrows what it dropped."""


def check_redistribution(value: str | None) -> None:
    """`ConfigError` unless `value` is None or a name in `REDISTRIBUTIONS`."""
    if value is not None and value not in REDISTRIBUTIONS:
        choices = ", ".join(REDISTRIBUTIONS)
        raise ConfigError(f"redistribution: {value!r} is not one of {choices}{nearest(str(value), REDISTRIBUTIONS)}")


def redistribute(total: int, shares: Sequence[float], room: Sequence[int]) -> list[int]:
    """Whole numbers that add up to `total`, in proportion to `shares`, none above its `room`.

    What a full layer cannot take is spread over the others in proportion to their shares; fractions go to the
    largest remainders, among equal ones to the first. Layers without a share take what the others have no room for,
    in proportion to their own room.

    Args:
        total: connections to place, at most `sum(room)`.
        shares: one number a layer, 0 or more, finite; only their ratios matter.
        room: free places of each layer.
    """
    if not 0 <= total <= sum(room):
        raise ValueError(f"{total} connections do not fit into {sum(room)} free places")
    counts = [0] * len(room)
    for weights in (list(shares), [float(places) for places in room]):
        # A layer that fills up leaves the round; every round fills one or places all that is left.
        while True:
            left = total - sum(counts)
            open_layers = [i for i, weight in enumerate(weights) if weight > 0 and counts[i] < room[i]]
            if left == 0 or not open_layers:
                break
            scale = sum(weights[i] for i in open_layers)
            full = [i for i in open_layers if left * (weights[i] / scale) >= room[i] - counts[i]]
            if full:
                for i in full:
                    counts[i] = room[i]
                continue
            exact = {i: left * (weights[i] / scale) for i in open_layers}
            for i in open_layers:
                counts[i] += math.floor(exact[i])
            remainders = sorted(open_layers, key=lambda i: (math.floor(exact[i]) - exact[i], i))
            for i in remainders[: total - sum(counts)]:
                counts[i] += 1
    return counts
