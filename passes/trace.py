"""Captures a copy of a model in train and in eval mode.

The first pass, and the only one that sees the user's model. Passes after it do not know which mechanism
made the graphs: the concrete tracer, or `torch.export`; one more is one more entry in `MECHANISMS`.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from fxsparse.capture.concrete_tracer import ConcreteTracer
from fxsparse.capture.exported import Exported
from fxsparse.capture.opaque_submodules import Around, capture_around
from fxsparse.capture.weight_hooks import computed_by_hooks, has_other_hooks
from fxsparse.core.errors import CaptureError, ConfigError, InputError
from fxsparse.core.graphs import pack_graph
from fxsparse.core.masking import apply_mask
from fxsparse.core.records import META_KEY, Captured, record_of, specs_of
from fxsparse.core.units import Units
from fxsparse.core.weight_operands import input_dependent, weight_operands

from .annotate_shapes import annotate_shapes


@dataclass(frozen=True)
class OneMode:
    """What a mechanism makes of a model in one mode.

    Attributes:
        graph: of ordinary nodes, with fx's own meta.
        changed: attributes that forward changes.
        readers: modules whose own `training` flag decided what is in the graph.
        notes: what the user should know, a sentence each.
        around: the units inside of what could not be traced; None where everything was.
    """

    graph: fx.Graph
    changed: Sequence[str] = ()
    readers: frozenset[nn.Module] = frozenset()
    notes: Sequence[str] = ()
    around: Around | None = None


Mechanism = Callable[[nn.Module, tuple, dict[str, Any]], OneMode]


def _concrete(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> OneMode:
    tracer = ConcreteTracer(model)
    graph, changed = tracer.capture(args, kwargs)
    model.__dict__.update(tracer.constants)
    notes = ["forward puts tensors away outside the model; the graph does not"] if tracer.leaves_values else []
    return OneMode(graph, changed, frozenset(tracer.modes_read), notes)


def _export(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> OneMode:
    exported = Exported(model)
    with torch.enable_grad():
        graph = exported.capture(args, kwargs)
    return OneMode(graph, exported.changed, frozenset(exported.modes_read), exported.notes)


def _opaque(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> OneMode:
    around = capture_around(model, args, kwargs)
    notes = [
        f"{f'{type(model.get_submodule(name)).__name__} {name}' if name else type(model).__name__} is kept as one "
        f"call, its submodules captured one by one: {reason}"
        for name, reason in around.opaque.items()
    ]
    return OneMode(around.graph, around.changed, frozenset(around.readers), notes, around)


MECHANISMS: dict[str, Mechanism] = {"concrete": _concrete, "export": _export, "opaque": _opaque}
"""Name -> function from a model in one mode and its example to what it makes of it.
Tried in this order; the first that does not raise `CaptureError` is used for both modes."""


def split_example(example_input: Any) -> tuple[tuple, dict[str, Any]]:
    """`(args, kwargs)` of an example: a tensor, a tuple of positional arguments or a dict of keyword ones."""
    if isinstance(example_input, (Tensor, PackedSequence)):  # the latter is a tuple, but one argument
        return (example_input,), {}
    if isinstance(example_input, tuple):
        return example_input, {}
    if isinstance(example_input, dict) and all(isinstance(key, str) for key in example_input):
        return (), dict(example_input)
    raise InputError(
        f"example_input is a {type(example_input).__name__}; give a tensor, a tuple of positional arguments, "
        "or a dict of keyword arguments"
    )


def trace(model: nn.Module, example_input: Any, mechanism: str = "auto") -> Captured:
    """Captures `model` for the example, in both modes, on a copy.

    Args:
        model: any module; never touched. Its own `training` flags decide the copy's.
        example_input: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        mechanism: a name from `MECHANISMS`, or `"auto"`: the first of them that captures the model.

    Raises:
        CaptureError: what could not be captured: module, source line, reason.
        InputError: the example does not fit the arguments of `forward`.
    """
    if mechanism != "auto" and mechanism not in MECHANISMS:
        raise ConfigError(f"capture: {mechanism!r} is not one of auto, {', '.join(MECHANISMS)}")
    args, kwargs = split_example(example_input)
    if isinstance(model, fx.GraphModule) and any(node.target is apply_mask for node in model.graph.nodes):
        raise CaptureError(f"cannot capture {type(model).__name__}: it has masks already; start from the plain model")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise CaptureError(f"cannot capture {type(model).__name__}: {name} has no shape yet; call the model once")
    own = _copied(model)
    failures: dict[str, CaptureError] = {}
    for name in MECHANISMS if mechanism == "auto" else (mechanism,):
        try:
            captured = _both_modes(own, args, kwargs, name, MECHANISMS[name])
        except CaptureError as error:
            failures[name] = error
        else:
            if captured.units is not None and not _reaches_weights(captured, captured.units):
                kept = ", ".join(path or captured.name for path in captured.units.opaque)
                failures[name] = CaptureError(
                    f"no weight is used outside of {kept}, which would be one call, nor in a submodule of it that "
                    "could be captured and checked by itself"
                )
                continue
            captured.reason = "; ".join(f"{other} capture: {error}" for other, error in failures.items())
            captured.notes.extend(_lost_gradient_hooks(model))
            return captured
    first, *others = failures.items()
    if not others:
        raise first[1]
    raise CaptureError("; ".join([str(first[1]), *(f"nor by {name}: {error}" for name, error in others)])) from first[1]


def _reaches_weights(captured: Captured, units: Units) -> bool:
    """Whether there is a weight in a unit, or in the graph around what is opaque."""
    if any(units.graphs.values()):
        return True
    annotate_shapes(captured)  # by shapes, weights are told from biases and gains
    for _, graph in captured.distinct_graphs():
        from_input = input_dependent(graph)
        if any(weight_operands(node, from_input) for node in graph.nodes):
            return True
    return False


def _both_modes(model: nn.Module, args: tuple, kwargs: dict, mechanism: str, capture: Mechanism) -> Captured:
    modes_before = {module: module.training for module in model.modules()}
    captures: dict[str, OneMode] = {}
    flags: dict[str, dict[str, bool]] = {}
    try:
        for mode in ("train", "eval"):
            model.train(mode == "train")
            own_flags = {name: module.training for name, module in model.named_modules()}
            flags[mode] = {name: training for name, training in own_flags.items() if training != (mode == "train")}
            captures[mode] = capture(model, args, kwargs)
            _keep_own_records(captures[mode].graph)
            around = captures[mode].around
            for graph in around.units.values() if around else ():
                _keep_own_records(graph)
    finally:
        for module, training in modes_before.items():
            module.training = training
    graphs = {mode: one.graph for mode, one in captures.items()}
    if pack_graph(graphs["train"]) == pack_graph(graphs["eval"]):
        graphs["train"] = graphs["eval"]
    readers = frozenset().union(*(one.readers for one in captures.values()))
    return Captured(
        type(model).__name__,
        model,
        graphs,
        (specs_of(args), specs_of(kwargs)),
        mechanism,
        notes=[*_notes(model, captures), *_lost_hooks(model, graphs)],
        flags=flags,
        mode_readers=tuple(name for name, module in model.named_modules() if name and module in readers),
        units=_units({mode: one.around for mode, one in captures.items() if one.around}),
    )


def _units(found: dict[str, Around]) -> Units | None:
    """What the modes found, together."""
    if not any(around.opaque for around in found.values()):
        return None
    units = Units()
    for mode, around in found.items():
        units.graphs[mode] = dict(around.units)
        units.calls[mode] = dict(around.calls)
        units.hidden |= around.hidden
        units.opaque |= around.opaque
    for name in units.graphs["train"].keys() & units.graphs["eval"].keys():
        if pack_graph(units.graphs["train"][name]) == pack_graph(units.graphs["eval"][name]):
            units.graphs["train"][name] = units.graphs["eval"][name]
    return units


def _copied(model: nn.Module) -> nn.Module:
    held = [tensor for module in model.modules() for tensor in computed_by_hooks(module).values()]
    try:
        return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in held})
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        computed = [
            f"{prefix}.{key}".lstrip(".")
            for prefix, module in model.named_modules()
            for key, value in module.__dict__.items()
            if isinstance(value, Tensor) and value.grad_fn is not None
        ]
        if computed:
            reason = (
                f"{', '.join(computed)} is computed from other tensors and kept as an attribute; for a weight, use "
                "torch.nn.utils.parametrizations (or prune.remove), else clear it"
            )
        raise CaptureError(f"cannot capture {type(model).__name__}: it cannot be copied: {reason}") from error


def _notes(model: nn.Module, captures: dict[str, OneMode]) -> list[str]:
    changed = {name for one in captures.values() for name in one.changed}
    for prefix, module in model.named_modules():  # made anew at every call, in the graph as well
        changed -= {f"{prefix}.{name}".lstrip(".") for name in computed_by_hooks(module)}
    notes = list(dict.fromkeys(note for one in captures.values() for note in one.notes))
    if changed:
        notes.insert(0, f"forward changes {', '.join(sorted(changed))}; the graph leaves them as they are")
    return notes


def _keep_own_records(graph: fx.Graph) -> None:
    """Keeps the module path of each node and drops fx's own meta, which holds classes and does not pickle."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        path = next(reversed(stack.values()))[0] if stack else ""
        known = record_of(node)
        node.meta.clear()
        node.meta[META_KEY] = replace(known, module=path)


def _lost_hooks(model: nn.Module, graphs: dict[str, fx.Graph]) -> list[str]:
    """Hooks on modules that the graph does not call as modules: their forward was recorded instead."""
    called = {node.target for graph in graphs.values() for node in graph.nodes if node.op == "call_module"}
    inside_called = tuple(f"{name}." for name in called)
    hooked = [
        name or "the model itself"
        for name, module in model.named_modules()
        if name not in called
        and not name.startswith(inside_called)
        and (module._forward_hooks or module._backward_hooks or has_other_hooks(module))
    ]
    if not hooked:
        return []
    return [
        f"hooks on {', '.join(hooked)} ran once, while tracing: what they compute is in the graph, what else they do "
        "is not"
    ]


def _lost_gradient_hooks(model: nn.Module) -> list[str]:
    """Hooks on parameters of the user's model, which its copy does not have."""
    hooked = [
        name
        for name, parameter in model.named_parameters()
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks
    ]
    return [f"gradient hooks on {', '.join(hooked)} are not copied; register them anew on the result"] if hooked else []
