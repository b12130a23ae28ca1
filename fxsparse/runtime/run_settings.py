"""What a saved state of a rewirer has to agree with, before anything of it is taken over."""

from dataclasses import asdict
from typing import Any

from ..core.errors import RuntimeStateError
from .methods import Method
from .schedule import Schedule
from .semantics import Semantics


def run_settings(
    method: Method, schedule: Schedule, semantics: Semantics, seed: int, granularity: object
) -> dict[str, Any]:
    """The settings of a run as plain data, for a saved state."""
    return {
        "method": method.name,
        "method_options": method.options(),
        "schedule": asdict(schedule),  # type: ignore[call-overload]
        "semantics": asdict(semantics),
        "seed": seed,
        "granularity": str(granularity),
    }


def check_saved(state: Any, settings: dict[str, Any]) -> None:
    """`RuntimeStateError` unless `state` is that of a rewirer, of a run with these settings."""
    if not isinstance(state, dict) or "step_count" not in state:
        raise RuntimeStateError(f"not the state of a rewirer: {state!r}"[:200])
    for key, value in settings.items():
        if state.get(key) != value and (key in state or key != "granularity"):  # older states have none
            raise RuntimeStateError(
                f"the saved rewirer has {key} {state.get(key)!r}, this one {value!r}; attach with the same settings"
            )
