"""What has to be arranged around a trace, because tracing runs the user's Python for real.

`patched_python` makes Python that looks at types or makes tensors see proxies. `module_state_kept` puts
back every attribute that `forward` set. `randomness_unchanged` notices random numbers that were drawn once,
at trace time, and would be frozen in the graph. `own_tensors.py` records what is done to the model's tensors.
"""

import builtins
import operator
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import _symbolic_trace as symbolic_trace
from torch.utils import _pytree as pytree
from torch.utils import checkpoint as checkpointing

from ..core.errors import CaptureError
from .concrete_proxy import ConcreteProxy, SizeTuple
from .own_tensors import OwnTensorsRecorded
from .shown_weights import weights_shown

FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "eye",
    "full",
    "linspace",
    "logspace",
    "normal",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "scalar_tensor",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
)
"""Functions of `torch` that make a tensor from plain values: recorded, else their result would be frozen."""

_plain_isinstance = builtins.isinstance


def _isinstance(instance: Any, classes: Any) -> bool:
    """`isinstance` to which a proxy is also what its value is."""
    if type(instance) is ConcreteProxy:
        return _plain_isinstance(instance, classes) or _plain_isinstance(instance.value, classes)
    if type(instance) is SizeTuple:
        return _plain_isinstance(instance, classes) or _plain_isinstance(torch.Size(()), classes)
    return _plain_isinstance(instance, classes)


@contextmanager
def patched_python(tracer: Any) -> Iterator[None]:
    """For the time of a trace: `isinstance` knows proxies, factories are recorded, lost regions refused."""

    def recorded(factory: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if tracer.values.running:
                return factory(*args, **kwargs)
            return tracer.create_proxy("call_function", factory, args, kwargs)

        return call

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not tracer.values.running and any(type(arg) is ConcreteProxy for arg in args):
            if cls.__name__ == "BackwardHookFunction":
                raise tracer.refused(
                    "a full backward hook is registered on this module, whose operations are recorded one by one; "
                    "remove the hook, and register it on the result if it is needed"
                )
            raise tracer.refused(
                f"the autograd function {cls.__name__} is called inside a module that has weights; "
                "call it from a submodule without weights, which is kept as one call"
            )
        return plain_apply.__get__(None, cls)(*args, **kwargs)  # a C descriptor since torch 2.14, without __func__

    def enter_autocast(region: torch.autocast) -> Any:
        if not tracer.values.running:
            raise tracer.refused("an autocast region inside forward would be lost; put autocast around the model")
        return plain_autocast(region)

    def call_scripted(function: Any, *args: Any, **kwargs: Any) -> Any:
        written = getattr(function, "_torchdynamo_inline", None)  # the Python function it was made from
        if tracer.values.running or written is None:
            return plain_scripted(function, *args, **kwargs)
        return written(*args, **kwargs)

    plain_scripted = torch.jit.ScriptFunction.__call__
    plain_apply = torch.autograd.Function.__dict__["apply"]
    plain_autocast = torch.autocast.__enter__

    with ExitStack() as stack:
        stack.enter_context(modes_read(tracer.modes_read, lambda: not tracer.values.running))
        stack.enter_context(OwnTensorsRecorded(tracer))
        stack.enter_context(weights_shown(tracer))
        for name in FACTORIES:
            stack.enter_context(mock.patch.object(torch, name, recorded(getattr(torch, name))))
        stack.enter_context(mock.patch.object(torch.autograd.Function, "apply", classmethod(apply)))
        stack.enter_context(mock.patch.object(torch.autocast, "__enter__", enter_autocast))
        stack.enter_context(mock.patch.object(torch.jit.ScriptFunction, "__call__", call_scripted))
        stack.enter_context(checkpointing_off())
        # Functions kept whole for plain tracing by torch.fx.wrap are seen through: weights may be inside.
        for registry in ("_wrapped_fns_to_patch", "_wrapped_methods_to_patch"):
            empty = type(getattr(symbolic_trace, registry))()
            stack.enter_context(mock.patch.object(symbolic_trace, registry, empty))
        stack.enter_context(torch.enable_grad())
        builtins.isinstance = _isinstance
        try:
            yield
        finally:
            builtins.isinstance = _plain_isinstance


@contextmanager
def modes_read(readers: set[nn.Module], counts: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Adds to `readers` each module whose `training` flag is looked at while `counts()`."""

    def read_mode(module: nn.Module) -> bool:
        if counts():
            readers.add(module)
        return module.__dict__["training"]

    def write_mode(module: nn.Module, training: bool) -> None:
        module.__dict__["training"] = training

    with mock.patch.object(nn.Module, "training", property(read_mode, write_mode), create=True):
        yield


@contextmanager
def checkpointing_off() -> Iterator[None]:
    """Activation checkpointing saves memory and changes no result; its functions do not take proxies."""
    with ExitStack() as stack:
        for name in ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl"):
            if hasattr(checkpointing, name):  # the second since torch 2.12
                stack.enter_context(mock.patch.object(checkpointing, name, _no_checkpoint))
        stack.enter_context(mock.patch.object(checkpointing, "CheckpointFunction", _DirectCall))
        yield


def _no_checkpoint(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Stands for the checkpointing of the non-reentrant kind, around a call that is traced through."""
    yield


class _DirectCall:
    """Stands for the checkpointing of the reentrant kind."""

    @staticmethod
    def apply(function: Callable, preserve_random_state: bool, *args: Any) -> Any:
        return function(*args)


_MISSING = object()
_MODULE_STATE = frozenset(nn.Module().__dict__)
"""Attributes that every module has: its tensors, submodules, hooks and mode."""


def _contents(value: Any) -> Any:
    """A shallow copy of a container, or the value itself."""
    return value.copy() if type(value) in (dict, list, set, deque) or hasattr(value, "move_to_end") else value


def _same_contents(before: Any, now: Any) -> bool:
    """Whether two containers hold the same things, or equal plain values."""
    (items, structure), (others, other_structure) = pytree.tree_flatten(before), pytree.tree_flatten(now)
    return structure == other_structure and all(
        a is b or (type(a) is type(b) and type(a) in (bool, int, float, str, type(None)) and a == b)
        for a, b in zip(items, others, strict=True)
    )


def _is_unchanged(value: Any, contents: Any, now: Any) -> bool:
    """Whether an attribute still holds `value`, or another with the same plain `contents`."""
    if now is not value:
        return type(now) is type(value) and _same_contents(contents, now)
    if isinstance(now, Mapping):
        return list(now) == list(contents) and all(now[key] is contents[key] for key in contents)
    if isinstance(now, (list, deque)):
        return len(now) == len(contents) and all(a is b for a, b in zip(now, contents, strict=True))
    return not isinstance(now, set) or set(map(id, now)) == set(map(id, contents))


Snapshot = list[tuple[str, nn.Module, dict[str, tuple[Any, Any]]]]
"""Name, module, and its attributes with their contents, of every module."""


def snapshot(root: nn.Module) -> Snapshot:
    """What `changed_attributes` and `module_state_kept` compare with."""
    return [
        (name, module, {key: (value, _contents(value)) for key, value in module.__dict__.items()})
        for name, module in root.named_modules()
    ]


def changed_attributes(before: Snapshot) -> list[str]:
    """Names of attributes that have changed since, and of new buffers; not of parameters, submodules and buffers."""
    changed = []
    for name, module, saved in before:
        prefix = f"{name}." if name else ""
        for key in sorted((saved.keys() | module.__dict__.keys()) - _MODULE_STATE):
            if not _is_unchanged(*saved.get(key, (_MISSING, _MISSING)), module.__dict__.get(key, _MISSING)):
                changed.append(prefix + key)
        changed.extend(prefix + key for key in module._buffers if key not in saved["_buffers"][1])
    return changed


@contextmanager
def module_state_kept(
    root: nn.Module, is_same_buffer: Callable[[Tensor, Any], bool] = operator.is_
) -> Iterator[dict[str, list[str]]]:
    """Restores every attribute of every submodule afterwards, and says what had changed.

    Args:
        is_same_buffer: whether what stands in a buffer's place after forward is still that buffer.

    Yields:
        A dict that is filled on leaving: `"buffers"` names buffers that were assigned anew, `"modules"` modules
        that got or lost parameters or submodules, `"attributes"` other attributes (counters, caches) that changed.
    """
    before = snapshot(root)
    changed: dict[str, list[str]] = {"buffers": [], "modules": [], "attributes": []}
    try:
        yield changed
    finally:
        changed["attributes"].extend(changed_attributes(before))
        for name, module, saved in before:
            prefix = f"{name}." if name else ""
            if not all(_is_unchanged(*saved[key], module.__dict__[key]) for key in ("_parameters", "_modules")):
                changed["modules"].append(name)
            for key, buffer in saved["_buffers"][1].items():
                if not is_same_buffer(buffer, module._buffers.get(key)):
                    changed["buffers"].append(prefix + key)
            module.__dict__.clear()
            for key, (value, contents) in saved.items():
                if contents is not value:
                    _refill(value, contents)
                module.__dict__[key] = value


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    container.extend(contents) if isinstance(container, (list, deque)) else container.update(contents)


def _random_states() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "Python's random": random.getstate(),
        "numpy.random": (name, tuple(np.asarray(keys).tolist()), *rest),
        "torch": torch.get_rng_state(),
    }


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Puts the CPU's random number generators back: Python's, numpy's and torch's."""
    before = _random_states()
    try:
        yield
    finally:
        random.setstate(before["Python's random"])
        np.random.set_state(before["numpy.random"])
        torch.set_rng_state(before["torch"])


@contextmanager
def randomness_unchanged(what: str) -> Iterator[None]:
    """Refuses a trace that drew real random numbers outside the graph; the generators are put back."""
    with random_state_kept():
        before = _random_states()
        yield
        after = _random_states()
        drawn = [name for name in before if not _same_state(before[name], after[name])]
        if drawn:
            raise CaptureError(
                f"cannot capture {what}: its forward draws from {' and '.join(drawn)} outside the graph, so the "
                "numbers would be frozen; draw them with torch functions such as torch.rand"
            )


def _same_state(before: Any, after: Any) -> bool:
    return torch.equal(before, after) if isinstance(before, Tensor) else before == after
