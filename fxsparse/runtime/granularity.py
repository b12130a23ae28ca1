"""Which methods and choices a granularity is for."""

from collections.abc import Mapping

from ..core.errors import ConfigError
from ..core.granularity import Channels, Given, Granularity, UnitLayout, read_granularity
from .methods import METHODS, Method
from .semantics import Semantics


def check_granularity(method: Method, given: Given, semantics: Semantics) -> Granularity:
    """The granularity of a run; `ConfigError` where the method, or a choice of `semantics`, is not for it."""
    granularity = read_granularity(given)
    if method.granularities == ("channel",) and granularity.kind == "weight":
        granularity = Channels()
    if granularity.kind not in method.granularities:
        takes = ", ".join(name for name, cls in METHODS.items() if granularity.kind in cls.granularities)
        raise ConfigError(f"method {method.name} is not for granularity {str(granularity)!r}; {takes} are")
    if granularity.kind == "channel":
        if method.redistribution is not None:
            raise ConfigError("redistribution: channels do not move between groups; leave it out")
        if getattr(method, "scope", "layer") != "layer":
            raise ConfigError("scope: channels are pruned group by group, so that none is emptied; use 'layer'")
        if semantics.optimizer_state != "masked":
            raise ConfigError(
                f"semantics: optimizer_state {semantics.optimizer_state!r} is not for channels, which are cut out; "
                "use 'masked'"
            )
    return granularity


def check_movement(method: Method, layouts: Mapping[str, UnitLayout], sparsities: Mapping[str, float]) -> None:
    """`ConfigError` where units that would move between the weights are not all of one size.

    A method that moves connections keeps their number; of units with fewer weights than others it could not.
    """
    if not method.moves_connections:
        return
    uneven = [name for name, layout in layouts.items() if not layout.even and sparsities[name] > 0.0]
    if uneven:
        raise ConfigError(
            f"granularity: method {method.name} moves blocks between the layers, and those of {', '.join(uneven)} are "
            f"not all of one size ({layouts[uneven[0]].describe(uneven[0])}), so that the number of weights would not "
            "be kept; name it in dense or exclude, take blocks that divide it, or a method that keeps every layer's "
            "number"
        )
