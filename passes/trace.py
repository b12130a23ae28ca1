"""Captures a copy of a model in train and in eval mode.

The first pass, and the only one that sees the user's model. Passes after it do not know which mechanism
made the graphs: a second one (`torch.export`, opaque submodules) is one more entry in `MECHANISMS`.
"""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from fxsparse.capture.concrete_tracer import ConcreteTracer
from fxsparse.core.errors import CaptureError, InputError
from fxsparse.core.graphs import pack_graph
from fxsparse.core.records import META_KEY, Captured, NodeRecord, specs_of

Mechanism = Callable[[nn.Module, tuple, dict[str, Any]], tuple[fx.Graph, list[str]]]


def _concrete(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[fx.Graph, list[str]]:
    return ConcreteTracer(model).capture(args, kwargs)


MECHANISMS: dict[str, Mechanism] = {"concrete": _concrete}
"""Name -> function from a model in one mode and its example to a graph and the attributes forward changes.
Tried in this order; the first that does not raise `CaptureError` is used for both modes."""


def split_example(example_input: Any) -> tuple[tuple, dict[str, Any]]:
    """`(args, kwargs)` of an example: a tensor, a tuple of positional arguments or a dict of keyword ones."""
    if isinstance(example_input, Tensor):
        return (example_input,), {}
    if isinstance(example_input, tuple):
        return example_input, {}
    if isinstance(example_input, dict) and all(isinstance(key, str) for key in example_input):
        return (), dict(example_input)
    raise InputError(
        f"example_input is a {type(example_input).__name__}; give a tensor, a tuple of positional arguments, "
        "or a dict of keyword arguments"
    )


def trace(model: nn.Module, example_input: Any) -> Captured:
    """Captures `model` for the example, in both modes, on a copy.

    Args:
        model: any module; never touched. Its own `training` flags decide the copy's.
        example_input: a tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Raises:
        CaptureError: what could not be captured: module, source line, reason.
    """
    args, kwargs = split_example(example_input)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise CaptureError(f"cannot capture {type(model).__name__}: {name} has no shape yet; call the model once")
    own = copy.deepcopy(model)
    failures: list[CaptureError] = []
    for mechanism, capture in MECHANISMS.items():
        try:
            return _both_modes(own, args, kwargs, mechanism, capture)
        except CaptureError as error:
            failures.append(error)
    raise failures[0]


def _both_modes(model: nn.Module, args: tuple, kwargs: dict, mechanism: str, capture: Mechanism) -> Captured:
    modes_before = {module: module.training for module in model.modules()}
    graphs: dict[str, fx.Graph] = {}
    changed: set[str] = set()
    try:
        for mode in ("train", "eval"):
            model.train(mode == "train")
            graphs[mode], attributes = capture(model, args, kwargs)
            changed.update(attributes)
            _keep_own_records(graphs[mode])
    finally:
        for module, training in modes_before.items():
            module.training = training
    if pack_graph(graphs["train"]) == pack_graph(graphs["eval"]):
        graphs["train"] = graphs["eval"]
    captured = Captured(type(model).__name__, model, graphs, (specs_of(args), specs_of(kwargs)), mechanism)
    if changed:
        captured.notes.append(f"forward changes {', '.join(sorted(changed))}; the graph leaves them as they are")
    captured.notes.extend(_lost_hooks(model, graphs))
    return captured


def _keep_own_records(graph: fx.Graph) -> None:
    """Keeps the module path of each node and drops fx's own meta, which holds classes and does not pickle."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        path = next(reversed(stack.values()))[0] if stack else ""
        node.meta.clear()
        node.meta[META_KEY] = NodeRecord(module=path)


def _lost_hooks(model: nn.Module, graphs: dict[str, fx.Graph]) -> list[str]:
    """Hooks on modules that the graph does not call as modules: their forward was recorded instead."""
    called = {node.target for graph in graphs.values() for node in graph.nodes if node.op == "call_module"}
    inside_called = tuple(f"{name}." for name in called)
    hooked = [
        name or "the model itself"
        for name, module in model.named_modules()
        if name not in called
        and not name.startswith(inside_called)
        and (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
    ]
    if not hooked:
        return []
    return [f"hooks on {', '.join(hooked)} do not run: the graph calls these modules' operations directly"]
