"""The last resort of capture: a submodule that cannot be traced stays one call, and its children are traced.

`capture_around(model, args, kwargs)` first lets one eager run tell how every submodule is called. It then traces
the model; where that fails inside a submodule, that submodule becomes opaque: a call whose result has the recorded
shapes. Where it fails in the model's own forward, the model as a whole is one call. Inside of what is opaque,
every submodule that can be captured on its own is a *unit*: its graph takes the place of its `forward`, on the
original object, so that whoever reads its attributes still can. A unit is kept only if it computes, in a run of the
example, bit for bit what the module does; otherwise its children are tried.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..core.arguments import structure_of, without_ranks
from ..core.errors import CaptureError
from ..core.records import META_KEY, NodeRecord, TensorSpec
from ..core.units import Call
from .concrete_tracer import ConcreteTracer, is_leaf
from .recorded_calls import Recording, copied, record_calls, undisturbed
from .unit_graphs import compile_graph, unit_graph

ROOT_CALL = "_opaque_forward"
"""Attribute of a model that is opaque as a whole: what runs its own forward."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Around:
    """What `capture_around` makes of a model in one mode.

    Attributes:
        graph, changed, readers: as of a capture of the whole.
        opaque: name of what is opaque -> why.
        units: name of a unit -> its graph.
        calls: name of a unit -> its recorded calls.
        hidden: name of a parameter -> why it is used outside of every unit.
    """

    graph: fx.Graph
    changed: list[str]
    readers: set[nn.Module]
    opaque: dict[str, str]
    units: dict[str, fx.Graph] = field(default_factory=dict)
    calls: dict[str, list[Call]] = field(default_factory=dict)
    hidden: dict[str, str] = field(default_factory=dict)


class OpaqueRoot:
    """Runs the forward that the user wrote, on the tensors of a model whose tree it shares."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)


def run_opaque(root: OpaqueRoot, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A node that stands for the whole forward of an opaque model."""
    return root(*args, **kwargs)


def capture_around(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Around:
    """Captures what can be captured of a model in its present mode.

    Raises:
        CaptureError: the model itself fails on the example, or has meta tensors, which cannot be run.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise CaptureError(f"cannot capture {type(model).__name__} with opaque submodules: it is on the meta device")
    try:
        recording = record_calls(model, args, kwargs)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise CaptureError(f"cannot capture {type(model).__name__}: it fails on the example: {reason}") from error
    found = _outside(model, args, kwargs, recording)
    _Inside(model, recording, found).search(args, kwargs)
    return found


# -- the graph around what is opaque ------------------------------------------------------------------------


class _AroundTracer(ConcreteTracer):
    """Keeps some submodules as calls whose results are those of the recorded run."""

    def __init__(self, model: nn.Module, opaque: Mapping[str, str], recording: Recording) -> None:
        super().__init__(model)
        self.opaque = opaque
        self.outputs = {name: iter(recording.outputs[name]) for name in opaque}
        self.failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.opaque or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None and m in (self.submodule_paths or {}):
                self.failed = self.path_of_module(m)
            raise

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "call_module" and node.target in self.opaque:
            return fake_result(self.values.mode, next(self.outputs[str(node.target)]))
        return super()._evaluate(node)


def fake_result(mode: Any, specs: Any) -> Any:
    """Fake tensors in the shapes that an opaque call returned."""

    def tensor(leaf: Any) -> Any:
        if not isinstance(leaf, TensorSpec):
            return leaf
        return torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=leaf.device)

    with mode:
        return pytree.tree_map(tensor, specs, is_leaf=lambda leaf: isinstance(leaf, TensorSpec))


def _outside(model: nn.Module, args: tuple, kwargs: dict[str, Any], recording: Recording) -> Around:
    opaque: dict[str, str] = {}
    while True:
        tracer = _AroundTracer(model, opaque, recording)
        try:
            graph, changed = tracer.capture(args, kwargs)
        except CaptureError as error:
            failed = tracer.failed
            if failed is None or failed in opaque or failed not in recording.calls:
                return _whole(model, recording, _reason(error))
            opaque[failed] = _reason(error)
            continue
        model.__dict__.update(tracer.constants)
        outputs = {name: iter(recording.outputs[name]) for name in opaque}
        for node in graph.nodes:
            if node.op == "call_module" and node.target in opaque:
                node.meta[META_KEY] = NodeRecord(spec=next(outputs[str(node.target)]), opaque=True)
        return Around(graph, changed, tracer.modes_read, opaque)


def _reason(error: CaptureError) -> str:
    return str(error).removeprefix("cannot capture ")


def _whole(model: nn.Module, recording: Recording, reason: str) -> Around:
    """The graph of a model that is one call."""
    model.__dict__[ROOT_CALL] = OpaqueRoot(model)
    graph = fx.Graph()
    own = graph.placeholder("*args")
    named = graph.placeholder("**kwargs")
    root = graph.get_attr(ROOT_CALL)
    call = graph.call_function(run_opaque, (root, own, named))
    call.meta[META_KEY] = NodeRecord(spec=recording.outputs[""][0], opaque=True)
    graph.output(call)
    return Around(graph, [], set(), {"": reason})


# -- units inside -------------------------------------------------------------------------------------------


class _Inside:
    """Looks for units below what is opaque."""

    def __init__(self, model: nn.Module, recording: Recording, found: Around) -> None:
        self.model = model
        self.recording = recording
        self.found = found
        self.modules = dict(model.named_modules())

    def search(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Finds units, verifies them in runs of the example until all hold, and lists what is left."""
        units: dict[str, fx.Graph] = {}
        for name in self.found.opaque:
            units |= dict(self._below(name))
        while units:
            wrong = self._differing(units, args, kwargs)
            if not wrong:
                break
            for name in wrong:
                del units[name]
                units |= dict(self._below(name))
        self.found.units = units
        self.found.calls = {name: self.recording.calls.get(name, []) for name in units}
        self.found.hidden = self._hidden(units)

    def _below(self, name: str) -> Iterator[tuple[str, fx.Graph]]:
        """Units among the children of a module, or among theirs."""
        prefix = f"{name}." if name else ""
        for key, child in self.modules[name].named_children():
            own = f"{prefix}{key}"
            if all(parameter.ndim < 2 for parameter in child.parameters()):
                continue
            graph = self._unit(own, child)
            if graph is not None:
                yield own, graph
            else:
                yield from self._below(own)

    def _unit(self, name: str, module: nn.Module) -> fx.Graph | None:
        calls = self.recording.calls.get(name) or _made_up_call(module)
        hooked = any(getattr(inner, hooks) for inner in module.modules() for hooks in _HOOKS)
        if not calls or hooked or "forward" in module.__dict__:
            return None
        structures = [structure_of(call) for call in _without_specs(calls)]
        several_ranks = any(other != structures[0] for other in structures)
        if several_ranks and any(without_ranks(other) != without_ranks(structures[0]) for other in structures):
            return None
        was_reached = name in self.recording.calls
        tracer = ConcreteTracer(module, any_rank=several_ranks or not was_reached)
        try:
            with undisturbed(self.model):
                graph, changed = tracer.capture(*_tensors_like(calls[0]))
        except CaptureError:
            return None
        if changed or tracer.leaves_values or (several_ranks and tracer.ranks_read):
            return None
        module.__dict__.update(tracer.constants)
        self.found.readers |= tracer.modes_read
        return unit_graph(graph, name)

    def _differing(self, units: Mapping[str, fx.Graph], args: tuple, kwargs: dict[str, Any]) -> list[str]:
        """Units that compute something else than their module in a run of the example, or nothing at all."""
        wrong: dict[str, None] = {}
        modules = {name: self.modules[name] for name in units}
        with undisturbed(self.model), checked_units(self.model, modules, units, wrong):
            self.model(*copied(args), **copied(kwargs))
        return list(wrong)

    def _hidden(self, units: Mapping[str, fx.Graph]) -> dict[str, str]:
        """Parameters below opaque modules that are used, or may be, outside of every unit."""
        hidden: dict[str, str] = {}
        reached = {
            id(parameter) for name in units for parameter in self.modules[name].parameters() if parameter.ndim > 1
        }
        for opaque in self.found.opaque:
            for own, parameter in self.modules[opaque].named_parameters(opaque):
                outside = [
                    stack
                    for stack in self.recording.users.get(id(parameter), ())
                    if not units.keys() & set(stack) and (not opaque or opaque in stack)
                ]
                title = f"{type(self.modules[opaque]).__name__} {opaque}".strip()
                if outside:
                    inner = outside[0][-1] if outside[0] else ""
                    kind = type(self.modules[inner]).__name__
                    hidden[own] = f"used inside of {title}, which is one call, by {kind} {inner}".rstrip()
                elif id(parameter) not in reached and self.model.training:
                    hidden[own] = f"inside of {title}, which is one call and does not use it for the example"
        return hidden


def _without_specs(calls: list[Call]) -> list[Call]:
    """Calls with the same stand-in for every tensor of as many dimensions, whatever its sizes."""
    return [
        pytree.tree_map(
            lambda leaf: torch.zeros([1] * len(leaf.shape)) if isinstance(leaf, TensorSpec) else leaf,
            call,
            is_leaf=lambda leaf: isinstance(leaf, TensorSpec),
        )
        for call in calls
    ]


def _tensors_like(call: Call) -> Call:
    def tensor(leaf: Any) -> Any:
        if not isinstance(leaf, TensorSpec):
            return leaf
        return torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=leaf.device).zero_()

    return pytree.tree_map(tensor, call, is_leaf=lambda leaf: isinstance(leaf, TensorSpec))


def _made_up_call(module: nn.Module) -> list[Call]:
    """A call for a layer that the example does not reach, such as the other side of a branch."""
    if not type(module).__module__.startswith("torch.nn.") or is_leaf(module):
        return []
    if isinstance(module, nn.Linear):
        shape: tuple[int, ...] = (2, module.in_features)
    elif not isinstance(module, nn.modules.conv._ConvNd):
        return []
    else:
        window = [
            dilation * (kernel - 1) + 1 for kernel, dilation in zip(module.kernel_size, module.dilation, strict=True)
        ]
        shape = (2, module.in_channels, *(size + 2 for size in window))
    weight: Any = module.weight
    stride = torch.empty(shape, device="meta").stride()
    return [((TensorSpec(shape, weight.dtype, stride, weight.device),), {})]


# -- verifying units ----------------------------------------------------------------------------------------


@contextmanager
def checked_units(
    model: nn.Module, modules: Mapping[str, nn.Module], graphs: Mapping[str, fx.Graph], wrong: dict[str, None]
) -> Iterator[None]:
    """For the time of a run: every call of a unit's module is also made by its graph, and compared."""

    def checking(name: str, module: nn.Module, forward: Callable, code: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.random.fork_rng(), undisturbed(module):
                own_args, own_kwargs = copied(args), copied(kwargs)
                try:
                    got: Any = code(model, *own_args, **own_kwargs)
                except Exception as error:
                    got = error
                after = [buffer.clone() for buffer in module.buffers()], (own_args, own_kwargs)
            result = forward(*args, **kwargs)
            changed = [*module.buffers()], (args, kwargs)
            if isinstance(got, Exception) or not (_seen_same(result, got) and _seen_same(changed, after)):
                wrong[name] = None
            return result

        return call

    for name, module in modules.items():
        module.__dict__["forward"] = checking(name, module, module.forward, compile_graph(graphs[name]))
    try:
        yield
    finally:
        for module in modules.values():
            module.__dict__.pop("forward", None)


def _seen_same(wanted: Any, got: Any) -> bool:
    """Whether two results can be seen to be the same; inside of a `vmap`, there is no looking at numbers."""
    try:
        return _same(wanted, got)
    except RuntimeError:
        return False


def _same(wanted: Any, got: Any) -> bool:
    """Whether two results hold the same bits, in the same places."""
    ours, theirs = pytree.tree_flatten(wanted), pytree.tree_flatten(got)
    if str(ours[1]) != str(theirs[1]):
        return False
    for one, other in zip(ours[0], theirs[0], strict=True):
        if isinstance(one, Tensor):
            if not isinstance(other, Tensor) or one.shape != other.shape or one.dtype != other.dtype:
                return False
            if not torch.equal(torch.nan_to_num(one.detach()), torch.nan_to_num(other.detach())):
                return False
        elif type(one) is not type(other):
            return False
        elif hasattr(one, "__dict__") and not callable(one):
            if not _same(vars(one), vars(other)):
                return False
        elif not callable(one) and one != other:
            return False
    return True
