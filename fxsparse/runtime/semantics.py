"""Where published implementations of drop-and-grow training differ: one named choice a row.

The defaults are the RigL paper's. `PRESETS` holds the choices of the paper, of google-research/rigl and of the
reproducibility report's code; docs/semantics.md is the same table with the evidence.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import ConfigError, nearest

CHOICES: dict[str, tuple[str, ...]] = {
    "rounding": ("floor", "ceil"),
    "regrown": ("kept", "zeroed", "forbidden"),
    "weight_update": ("method", "gradient", "replaced", "first"),
    "gradient": ("mean", "magnitude"),
    "optimizer_state": ("masked", "new", "kept"),
    "end": ("exclusive", "inclusive"),
    "start": ("after", "on", "zero"),
    "initial_masks": ("exact", "bernoulli"),
    "dense_sites": ("inside", "outside"),
    "channel_score": ("mean_of_magnitudes", "magnitude_of_mean"),
}
"""Choice -> the values it may take."""


@dataclass(frozen=True, kw_only=True)
class Semantics:
    """The choices; a wrong value raises `ConfigError`.

    Attributes:
        rounding: k, the number of connections that a site drops, is the `"floor"` or the `"ceil"` of
            fraction times active.
        regrown: a connection that is dropped and grown in the same rewiring is `"kept"` with its value and
            optimizer state, comes back `"zeroed"`, or is `"forbidden"`: growth then chooses among those that
            were inactive before, and a site drops no more than there are.
        weight_update: on an update step the optimizer's step is `"replaced"` by the rewiring, or comes
            `"first"`, for every method. `"method"`: methods that grow, and SNIP, replace it, pruning does not.
            `"gradient"`: only methods that need a dense gradient on that step replace it.
        gradient: growth goes by the magnitude of the `"mean"` gradient over micro-batches and replicas, or by
            the mean of the gradients' `"magnitude"`.
        optimizer_state: of inactive weights: `"masked"` is zero always; `"new"` lets it run on after a drop
            and zeroes it for new connections only; `"kept"` zeroes nothing.
        end: whether `t_end` itself is an update step: `"exclusive"`, `"inclusive"`.
        start: with an interval of 100, the first rewiring is `"after"` 100 steps were made (the 101st call), `"on"` the
            100th, or at step `"zero"`.
        initial_masks: `"exact"` counts, or `"bernoulli"`: every weight by its own coin.
        dense_sites: sites that are named dense count `"inside"` the budget, so that the others make up for them, or
            `"outside"`.
        channel_score: at the granularity of channels, a channel's weights and gradients enter by the
            `"mean_of_magnitudes"` or by the `"magnitude_of_mean"`.
    """

    rounding: str = "floor"
    regrown: str = "kept"
    weight_update: str = "method"
    gradient: str = "mean"
    optimizer_state: str = "masked"
    end: str = "exclusive"
    start: str = "after"
    initial_masks: str = "exact"
    dense_sites: str = "inside"
    channel_score: str = "mean_of_magnitudes"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(
                    f"semantics: {name} is {value!r}; it is one of {', '.join(choices)}{nearest(str(value), choices)}"
                )
        if self.gradient == "magnitude" and self.weight_update == "first":
            raise ConfigError(
                "semantics: gradient 'magnitude' needs the weight update to be replaced; 'first' steps on the gradient"
            )


PRESETS: dict[str, Semantics] = {
    "paper": Semantics(),
    "rigl-tf": Semantics(
        weight_update="gradient", optimizer_state="new", end="inclusive", start="zero", dense_sites="outside"
    ),
    "report": Semantics(
        rounding="ceil",
        regrown="zeroed",
        weight_update="replaced",
        start="on",
        initial_masks="bernoulli",
        dense_sites="outside",
        channel_score="magnitude_of_mean",
    ),
}
"""Preset -> its choices."""

METHOD_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "rigl-tf": {"snfs": {"redistribution": None}},
    "report": {"snfs": {"momentum": "optimizer"}, "pruning": {"scope": "global"}},
}
"""Preset -> method -> options that it has there unless the user says otherwise."""


def make_semantics(given: "str | Semantics | Mapping[str, Any]") -> Semantics:
    """Choices from a preset's name, from themselves, or from a mapping of choices over a `preset` (the paper's).

    Raises:
        ConfigError: an unknown preset, choice or value.
    """
    if isinstance(given, Semantics):
        return given
    if isinstance(given, Mapping):
        changes = dict(given)
        preset = make_semantics(changes.pop("preset", "paper"))
        for name in changes:
            if name not in CHOICES:
                raise ConfigError(
                    f"semantics: there is no choice {name!r}; there are {', '.join(CHOICES)}{nearest(name, CHOICES)}"
                )
        return dataclasses.replace(preset, **changes)
    if not isinstance(given, str) or given not in PRESETS:
        raise ConfigError(f"semantics: {given!r} is not one of {', '.join(PRESETS)}{nearest(str(given), PRESETS)}")
    return PRESETS[given]


def preset_of(given: "str | Semantics | Mapping[str, Any]") -> str:
    """The preset that `given` names or starts from."""
    if isinstance(given, Mapping):
        return preset_of(given.get("preset", "paper"))
    return given if isinstance(given, str) else "paper"
