"""Which methods and choices a granularity is for."""

from collections.abc import Mapping

from ..core.errors import ConfigError
from ..core.granularity import Channels, Given, Granularity, NofM, UnitLayout, read_granularity
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
    if isinstance(granularity, NofM):
        _check_groups(method, granularity, semantics)
    return granularity


def _check_groups(method: Method, granularity: NofM, semantics: Semantics) -> None:
    """`ConfigError` for what would not leave N active in every group of M."""
    if method.redistribution is not None:
        raise ConfigError(
            f"granularity {granularity}: every layer has the density {granularity.keep}/{granularity.of}, so that "
            "connections do not move between layers; use redistribution='none'"
        )
    if getattr(method, "scope", "layer") != "layer":
        raise ConfigError(f"scope: every layer has the density of granularity {granularity}; use 'layer'")
    if semantics.initial_masks == "bernoulli" and method.initial_sparsity(0.5) != 0.0:
        raise ConfigError(
            f"semantics: initial_masks 'bernoulli' does not give {granularity.keep} of every {granularity.of} weights; "
            "use semantics={'preset': 'report', 'initial_masks': 'exact'}, in a command --semantics-options "
            "initial_masks=exact"
        )


def check_goal(
    granularity: Granularity,
    *,
    sparsity: float | None = None,
    flops: float | None = None,
    distribution: str | Mapping[str, float] = "erk",
    explicit: Mapping[str, float] | None = None,
    power: float = 1.0,
) -> float | None:
    """The sparsity that a granularity fixes; None for one that leaves it open.

    Raises:
        ConfigError: a goal that it contradicts, with what would be accepted.
    """
    if not isinstance(granularity, NofM):
        return None
    fixed = f"granularity {granularity} fixes the sparsity of every layer at {granularity.sparsity:.4g}"
    if sparsity is not None and abs(float(sparsity) - granularity.sparsity) > 5e-4:
        raise ConfigError(f"sparsity: {sparsity}, and {fixed}; leave sparsity out, or choose another N:M")
    if flops is not None:
        raise ConfigError(f"flops: {fixed}; leave flops out")
    if distribution not in ("erk", "uniform"):
        raise ConfigError(f"distribution: {fixed}; leave distribution out (dense= keeps layers dense)")
    if explicit:
        raise ConfigError(f"explicit: {fixed}; leave explicit out (dense= keeps layers dense)")
    if power != 1.0:
        raise ConfigError(f"power: {fixed}; leave power out")
    return granularity.sparsity


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
