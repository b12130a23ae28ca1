"""Lets the `state_dict` of an optimizer of lowered weights speak of dense ones, so that checkpoints move freely.

Saving puts every number in its place among zeros, loading picks those of active weights. Where the optimizer's state
is loaded before the module's, the pattern is still to come: what was loaded is picked from anew when it is there.
"""

from typing import Any

import torch
from torch import Tensor

from ..core.errors import RuntimeStateError
from ..kernels import SparsePattern
from .lowered_site import pattern_of


class LoweredState:
    """The optimizer's state of those weights of a module that are lowered at the time."""

    def __init__(self, module: Any, optimizer: torch.optim.Optimizer) -> None:
        self._module = module
        self._optimizer = optimizer
        self._loaded: dict[str, dict[str, Tensor]] = {}  # weight -> its dense state, until the next step

    def hooks(self) -> list:
        """Registers with the optimizer; returns the handles."""
        return [
            self._optimizer.register_state_dict_post_hook(self._dense_state),
            self._optimizer.register_load_state_dict_pre_hook(self._active_state),
        ]

    def stepped(self) -> None:
        """The optimizer goes on: a state that was loaded is its own now."""
        self._loaded.clear()

    @torch.no_grad()
    def patterns_loaded(self) -> None:
        """Other patterns may have come after the optimizer's state."""
        for name, loaded in self._loaded.items():
            if name in self._module.lowered:
                values, pattern = self._module.get_parameter(name), self._pattern(name)
                state = self._optimizer.state[values]
                for label, dense in loaded.items():
                    state[label] = pattern.gather(dense).to(state[label])

    def _pattern(self, name: str) -> SparsePattern:
        return pattern_of(self._module, name, self._module.lowered[name])

    def _names(self, state_dict: dict[str, Any]) -> dict[Any, str]:
        """Key in a state -> name of the weight, of those that are lowered."""
        names = {id(self._module.get_parameter(name)): name for name in self._module.lowered}
        held = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        if len(keys) != len(held):
            return {}  # of another model; torch says so
        return {key: names[id(parameter)] for key, parameter in zip(keys, held, strict=True) if id(parameter) in names}

    @torch.no_grad()
    def _dense_state(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = dict(state_dict["state"])
        for key, name in self._names(state_dict).items():
            pattern, shape = self._pattern(name), self._module.get_parameter(name).shape
            state[key] = {
                label: pattern.scatter(value) if isinstance(value, Tensor) and value.shape == shape else value
                for label, value in state.get(key, {}).items()
            }
            if not state[key]:
                del state[key]
        return {**state_dict, "state": state}

    @torch.no_grad()
    def _active_state(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state, loaded = dict(state_dict["state"]), {}
        for key, name in self._names(state_dict).items():
            pattern, own = self._pattern(name), state.get(key, {})
            dense = {label: value for label, value in own.items() if isinstance(value, Tensor) and value.numel() > 1}
            for label, value in dense.items():
                if value.shape != pattern.shape:
                    raise RuntimeStateError(
                        f"{label} of {name} has shape {tuple(value.shape)} in this state_dict; a state is saved and "
                        f"loaded with the weight's shape, {pattern.shape}"
                    )
            if dense:
                state[key] = own | {label: pattern.gather(value.cpu()) for label, value in dense.items()}
                loaded[name] = dense
        self._loaded = loaded
        return {**state_dict, "state": state}
