"""What an eager run of the example does inside a model: the calls of its submodules, and who uses which weight."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..core.arguments import map_leaves
from ..core.errors import CaptureError
from ..core.records import specs_of
from ..core.units import Call
from .guards import module_state_kept, random_state_kept


@dataclass
class Recording:
    """One run.

    Attributes:
        calls: name of a submodule -> its calls, in order.
        outputs: name of a submodule (empty for the model) -> what each call returned, with `TensorSpec`s.
        users: id of a parameter -> the submodules (innermost last) that were running when it was used.
    """

    calls: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    users: dict[int, set[tuple[str, ...]]] = field(default_factory=lambda: defaultdict(set))


def record_calls(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Recording:
    """Runs the model for real, in its present mode, and puts it back as it was.

    Raises:
        CaptureError: forward makes parameters or submodules, which nobody could train.
        Exception: whatever forward raises.
    """
    recording = Recording()
    running: list[str] = []

    def recorder(name: str, forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = specs_of((args, kwargs))
            running.append(name)
            try:
                result = forward(*args, **kwargs)
            finally:
                running.pop()
            recording.calls[name].append(given)
            recording.outputs[name].append(specs_of(result))
            return result

        return call

    names = {name: module for name, module in model.named_modules() if name and "forward" not in module.__dict__}
    forwards = {name: recorder(name, module.forward) for name, module in names.items()}
    with undisturbed(model) as changed, _replaced_forwards(names, forwards), _Users(model, running, recording):
        recording.outputs[""].append(specs_of(model(*copied(args), **copied(kwargs))))
    if changed["modules"]:
        raise CaptureError(f"forward adds or replaces parameters or submodules of {changed['modules'][0]}")
    return recording


def copied(tree: Any) -> Any:
    """The arguments again, since a forward may change its inputs in place."""
    return map_leaves(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[dict[str, list[str]]]:
    """Puts buffers, attributes and random numbers back; gradients are on, as in training.

    Yields:
        As of `module_state_kept`: what had changed, filled on leaving.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.enable_grad(), torch.random.fork_rng(), random_state_kept(), module_state_kept(model) as changed:
            yield changed
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@contextmanager
def _replaced_forwards(modules: Mapping[str, nn.Module], forwards: Mapping[str, Any]) -> Iterator[None]:
    for name, module in modules.items():
        module.__dict__["forward"] = forwards[name]
    try:
        yield
    finally:
        for module in modules.values():
            module.__dict__.pop("forward", None)


class _Users(TorchFunctionMode):
    """Notes which submodules are running whenever a torch function is given a parameter."""

    def __init__(self, model: nn.Module, running: Sequence[str], recording: Recording) -> None:
        super().__init__()
        self.parameters = {id(parameter) for parameter in model.parameters()}
        self.running = running
        self.users = recording.users

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") != "__get__" or isinstance(result, Tensor):  # not a look at its shape
            for leaf in pytree.tree_leaves((args, kwargs)):
                if id(leaf) in self.parameters:
                    self.users[id(leaf)].add(tuple(self.running))
        return result
