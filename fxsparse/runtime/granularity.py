"""What is dropped and grown as one: single weights, or whole channels."""

from ..core.errors import ConfigError, nearest
from .methods import METHODS, Method
from .semantics import Semantics

GRANULARITIES = ("weight", "channel")
"""What can be dropped and grown as one."""


def check_granularity(method: Method, granularity: str, semantics: Semantics) -> str:
    """The granularity of a run; `ConfigError` where the method, or a choice of `semantics`, is not for it."""
    if granularity not in GRANULARITIES:
        raise ConfigError(
            f"granularity: {granularity!r} is not one of {', '.join(GRANULARITIES)}"
            f"{nearest(str(granularity), GRANULARITIES)}"
        )
    if method.granularities == ("channel",):
        granularity = "channel"
    if granularity not in method.granularities:
        takes = ", ".join(name for name, cls in METHODS.items() if granularity in cls.granularities)
        raise ConfigError(f"method {method.name} is not for granularity {granularity!r}; {takes} are")
    if granularity == "channel":
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
