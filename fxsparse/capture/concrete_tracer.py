"""Captures a module's forward as an `fx.Graph`, with the example's values at hand.

`ConcreteTracer(model).capture(args, kwargs)` runs `forward` once on proxies that know the value each node
has for the example (`concrete_proxy.py`), computed on fake tensors (`fake_values.py`). Shape arithmetic is
recorded, control flow on shapes, flags and `None` resolves, control flow on tensor contents is refused.

What stays one call: modules that own no matrix-shaped parameter (dropout, activations, normalisation,
pooling, stochastic depth), which then behave by themselves in train and eval; and the few modules of
`torch.nn` with weights that nobody asked for yet. Convolutions, linears, embeddings, recurrent and attention
layers and parametrizations are traced through, so that every weight appears as an operand.
"""

import dataclasses
import inspect
import operator
import os
import traceback
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)
from torch.nn.utils import parametrize

from ..core.arguments import (
    check_argument,
    check_decision,
    is_object,
    structure_is_constant,
    structure_of,
    without_ranks,
)
from ..core.errors import CaptureError
from ..core.graphs import drop_unused_arithmetic, has_effect
from .bound_example import bound_example
from .concrete_proxy import ConcreteProxy, SizeTuple, is_number, is_plain
from .fake_values import FakeEvaluator
from .guards import module_state_kept, patched_python, random_state_kept, randomness_unchanged
from .leftovers import remove_leftovers
from .made_objects import construction, may_make, take_apart
from .no_grad_regions import detached
from .own_tensors import plain_tensors
from .user_code import calling_line, instruction, user_line

TRACED_THROUGH = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    parametrize.ParametrizationList,
    nn.Sequential,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)
"""Modules of `torch.nn` with weights whose forward is recorded operation by operation."""

_UNKNOWABLE = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
"""What fake tensors raise where a result depends on contents."""


def is_leaf(module: nn.Module) -> bool:
    """Whether a module stays one call in the graph (see the head of this file)."""
    if all(parameter.ndim < 2 for parameter in module.parameters()):
        return True
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, TRACED_THROUGH)


class ConcreteTracer(fx.Tracer):
    """One capture of one module in its present mode. Use a new tracer for every capture.

    Attributes, to be read after `capture`:
        results: the value of every node for the example.
        constants: tensors that the graph reads as attributes of the model, and that it does not have yet.
        modes_read: modules that are traced through and whose `training` flag forward looked at.
        ranks_read: whether forward has asked a tensor for its number of dimensions or all of its sizes.
        leaves_values: whether forward has put values of the trace away outside the model (in a global list).
    """

    proxy_buffer_attributes = True

    def __init__(self, model: nn.Module, *, any_rank: bool = False) -> None:
        """A tracer of `model`; with `any_rank`, the graph takes tensors of any number of dimensions."""
        super().__init__()
        self.model = model
        self.any_rank = any_rank
        self.ranks_read = False
        self.values = FakeEvaluator(model)
        self.results: dict[fx.Node, Any] = {}
        self.constants: dict[str, Any] = {}
        self.modes_read: set[nn.Module] = set()
        self.leaves_values = False
        tensors = (*plain_tensors(model), *model.named_buffers(), *model.named_parameters())
        self._names = {id(tensor): name for name, tensor in tensors}
        self._attribute_proxies: dict[str, Any] = {}
        self._decisions: dict[tuple[Callable, fx.Node], Any] = {}
        self._probes: list[tuple[tuple[FrameType | None, int], tuple[Callable, fx.Node], fx.Node]] = []
        self._handed_out: list[weakref.ref] = []
        self._refusals: list[CaptureError] = []
        self._being_made: set[int] = set()
        self._location: tuple[str, str] | None = None
        self._is_over = False

    # -- the one entry point ------------------------------------------------------------------------------

    def capture(self, args: tuple, kwargs: dict[str, Any]) -> tuple[fx.Graph, list[str]]:
        """The graph of `model.forward`, and the attributes that forward would have changed.

        Args:
            args, kwargs: the example's arguments; tensors real, fake or on meta.

        Raises:
            CaptureError: naming the submodule, the line of the user's code and the reason.
            InputError: the example does not fit the arguments of `forward`.
        """
        title = type(self.model).__name__
        self._example = bound_example(self.model, args, kwargs)
        self._named = frozenset(kwargs)  # decorators tell these from positional arguments
        try:
            with (
                randomness_unchanged(title),
                module_state_kept(self.model, self._is_same_buffer) as changed,
                patched_python(self),
            ):
                graph = self.trace(self.model)
                self.constants = self._new_attributes(graph)
        except CaptureError as error:
            traceback.clear_frames(error.__traceback__)  # their variables hold values of the trace
            raise
        except Exception as error:
            explained = self._explained(error)
            traceback.clear_frames(error.__traceback__)
            raise explained from error
        finally:
            self._is_over = True
            self._attribute_proxies.clear()
            self.leaves_values = remove_leftovers(self._handed_out)
        if self._refusals:  # forward caught it, and went on in a way that it does not go for real
            raise self._refusals[0]
        if changed["modules"]:
            raise CaptureError(
                f"cannot capture {title}: forward adds or replaces parameters or submodules of "
                f"{changed['modules'][0] or 'the model'}; call the model once before, or make them in __init__"
            )
        if changed["buffers"]:
            raise CaptureError(
                f"cannot capture {title}: forward assigns the buffer {changed['buffers'][0]} anew, which a graph "
                "cannot do; change it in place (buffer.copy_(...))"
            )
        graph._tracer_cls = None  # a graph of ordinary nodes from here on: nothing of this tracer goes along
        drop_unused_arithmetic(graph)
        called = tuple(f"{node.target}." for node in graph.nodes if node.op == "call_module")
        changes = [name for name in changed["attributes"] if name not in self.constants]
        return graph, [name for name in changes if not name.startswith(called)]

    def _new_attributes(self, graph: fx.Graph) -> dict[str, Any]:
        """Constants that fx has set on the model for the graph to read."""
        read = {str(node.target) for node in graph.nodes if node.op == "get_attr"} - set(self._names.values())
        return {name: value for name, value in self.model.__dict__.items() if name in read}

    def _refuse_late_use(self) -> None:
        if self._is_over:
            raise CaptureError(
                f"forward of {type(self.model).__name__} has put a value away in a global variable or a cache while it "
                "was captured, and that value is used now"
            )

    # -- hooks that fx.Tracer calls -----------------------------------------------------------------------

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m is not self.model and is_leaf(m)

    def call_module(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        was_made_in_forward = m not in (self.submodule_paths or {})  # nn.ReLU()(x), or self.layers[:2](x)
        if self.values.running or was_made_in_forward:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if self.values.running or not isinstance(attr_val, Tensor) or id(attr_val) not in self._names:
            return attr_val
        return self.own_proxy(attr_val)

    def own_proxy(self, tensor: Any) -> ConcreteProxy | None:
        """The proxy of one of the model's own tensors; None for anything else."""
        name = self._names.get(id(tensor))
        if name is None:
            return None
        if name not in self._attribute_proxies:
            self._attribute_proxies[name] = self.create_proxy("get_attr", name, (), {})
        return self._attribute_proxies[name]

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list]:
        """One placeholder for every parameter of `forward`, under its own name and with its default."""
        positional: list[Any] = []
        keyword: dict[str, Any] = {}
        for parameter in self._example.signature.parameters.values():
            value = self._placeholder(parameter)
            if parameter.kind is parameter.VAR_POSITIONAL:
                positional.extend(value)
            elif parameter.kind is parameter.VAR_KEYWORD:
                keyword.update({key: value[key] for key in value.keys()})  # noqa: SIM118 - proxy, not dict
            elif parameter.kind is parameter.KEYWORD_ONLY or parameter.name in self._named:
                keyword[parameter.name] = value
            elif parameter.name in self._example.arguments:
                positional.append(value)
        has_hooks = self.model._forward_hooks or self.model._forward_pre_hooks
        return lambda: (self.model if has_hooks else self.model.forward)(*positional, **keyword), []

    def create_arg(self, a: Any) -> Any:
        if type(a) is ConcreteProxy:
            a.tracer._refuse_late_use()
            return a.node
        if isinstance(a, dict) and type(a) is not dict:
            return self.create_node("call_function", *construction(a, self.create_arg))
        if may_make(a) and not dataclasses.is_dataclass(a):
            return self._made(a)
        if type(a) in (SizeTuple, torch.Size):
            return tuple(self.create_arg(element) for element in a)
        own = self.own_proxy(a)
        if own is not None:
            return own.node
        if isinstance(a, Tensor) and a.grad_fn is not None:
            raise self.refused("a tensor that was computed outside of forward takes part, and it has a gradient")
        return super().create_arg(a)

    def _made(self, value: Any) -> fx.Node:
        """The node that makes an object like `value`, which forward may hand on more than once."""
        if id(value) in self._being_made:
            raise self.refused(f"a {type(value).__name__} that refers to itself takes part")
        self._being_made.add(id(value))
        try:
            return self.create_node("call_function", *take_apart(value, self.create_arg))
        finally:
            self._being_made.remove(id(value))

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple,
        kwargs: dict,
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        """Records a node, computes its value, and returns a proxy, or the value itself where it is plain."""
        self._refuse_late_use()
        self._forget_probes()
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs), name, type_expr)
        self._location = calling_line()
        try:
            value = self._evaluate(node)
        except Exception as error:
            self.graph.erase_node(node)  # forward may catch the error and go on
            if isinstance(error, _UNKNOWABLE):
                self._refusals.append(self._explained(error))
            raise
        if not torch.is_grad_enabled() and not self.values.running:
            return detached(self, node, value)
        return self.wrapped(node, value)

    def decided(self, function: Callable, proxy: ConcreteProxy) -> Any:
        """`function` of a proxy as a plain value, and a node that refuses calls for which it is another."""
        self._refuse_late_use()
        key = (function, proxy.node)
        if key not in self._decisions:
            node = self.create_node("call_function", function, (proxy.node,), {})
            self.results[node] = self._decisions[key] = self._evaluate(node)
            self._probes.append((instruction(), key, self._check(node)))
        return self._decisions[key]

    def _forget_probes(self) -> None:
        """Takes back decisions that torch's argument parser asked for, to see whether the argument is a number."""
        asks_now = instruction()
        for asked_by, key, check in self._probes:
            if asked_by == asks_now and key[0] is operator.index:
                for node in [check, *check.all_input_nodes]:
                    self.graph.erase_node(node)
                del self._decisions[key]
        self._probes.clear()

    def _check(self, node: fx.Node) -> fx.Node:
        line, text = calling_line() or ("forward", "")
        place = f"{os.path.basename(line)}: `{text}`"
        return self.create_node("call_function", check_decision, (node, self.results[node], place), {})

    # -- values -------------------------------------------------------------------------------------------

    def _evaluate(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._result)
        if node.op != "call_module":
            return self.values.run(node.op, node.target, args, kwargs)
        with random_state_kept():
            return self.values.run(node.op, node.target, args, kwargs)

    def _result(self, node: fx.Node) -> Any:
        if node not in self.results:  # a constant, for which fx makes a node by itself
            self.results[node] = self._evaluate(node)
        return self.results[node]

    def wrapped(self, node: fx.Node, value: Any) -> Any:
        self.results[node] = value
        if is_plain(value):
            if self._is_decision(node):
                self._check(node)
            elif not has_effect(node) and (value is not None or node.target in (getattr, operator.getitem)):
                self.graph.erase_node(node)
            return value
        proxy: Any = ConcreteProxy(node, self, value)
        self._handed_out.append(weakref.ref(proxy))
        return SizeTuple(proxy[i] for i in range(len(value))) if isinstance(value, torch.Size) else proxy

    def _is_decision(self, node: fx.Node) -> bool:
        """Whether a plain value was made of numbers, or read from an object that is an argument."""
        sources = [self.results[source] for source in node.all_input_nodes]
        value = self.results[node]
        return (value is None or isinstance(value, (bool, str))) and (
            bool(sources) and all(is_number(source) or is_object(source) for source in sources)
        )

    def _is_same_buffer(self, buffer: Tensor | None, now: Any) -> bool:
        """`self.calls += 1` assigns the buffer to itself: what stands there is a proxy of its twin."""
        return now is buffer or (
            type(now) is ConcreteProxy and buffer is not None and now.value is self.values.twin(buffer)
        )

    def _placeholder(self, parameter: inspect.Parameter) -> Any:
        kinds: dict[Any, str] = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        stars = kinds.get(parameter.kind, "")
        empty = {"*": (), "**": {}}.get(stars, parameter.default)
        example = self._example.arguments.get(parameter.name, empty)
        has_default = not stars and parameter.default is not parameter.empty
        # Without `*`, the generated forward lists keyword-only parameters after those with defaults.
        default = parameter.default if has_default else None
        optional = has_default or parameter.kind is parameter.KEYWORD_ONLY
        if not structure_is_constant(default):
            if parameter.name not in self._example.arguments:
                raise CaptureError(
                    f"cannot capture {type(self.model).__name__}: the default of its argument {parameter.name} is a "
                    f"{type(default).__name__}, which a graph cannot hold; give it in example_input"
                )
            default = None
        node = self.create_node(
            "placeholder", stars + parameter.name, (default,) if optional else (), {}, parameter.name
        )
        value = self.values.twins(example)
        self.results[node] = value
        structure = without_ranks(structure_of(value)) if self.any_rank else structure_of(value)
        if optional or not isinstance(value, Tensor) or not self.any_rank:
            self.create_node("call_function", check_argument, (node, structure, parameter.name), {})
        return value if structure_is_constant(value) else ConcreteProxy(node, self, value)

    # -- errors -------------------------------------------------------------------------------------------

    def refused(self, reason: str) -> CaptureError:
        """The error for something that a graph cannot hold, at the line of user code being traced."""
        place = calling_line()
        error = CaptureError(f"cannot capture {type(self.model).__name__}: {self._where(place)}: {reason}")
        self._refusals.append(error)
        return error

    def data_dependent(self, reason: str) -> CaptureError:
        return self.refused(f"{reason}, so the graph would only be right for the example")

    def _explained(self, error: Exception) -> CaptureError:
        place = user_line(traceback.extract_tb(error.__traceback__)) or self._location
        reason = str(error).strip().split("\n")[0]
        if not reason or isinstance(error, (KeyError, AssertionError, StopIteration)):
            reason = f"{type(error).__name__} {reason}".strip()
        if isinstance(error, UnsupportedFakeTensorException | RuntimeError) and (
            "data-dependent" in reason.lower() or "DataDependent" in type(error).__name__
        ):
            reason = "the result depends on the data of a tensor, so the graph would only be right for the example"
        elif "DynamicOutputShape" in type(error).__name__ or "DataDependent" in type(error).__name__:
            reason = f"{reason}: the shape or value of the result depends on the data of a tensor"
        return CaptureError(f"cannot capture {type(self.model).__name__}: {self._where(place)}: {reason}")

    def _where(self, place: tuple[str, str] | None) -> str:
        module, kind = (
            (next(reversed(self.module_stack.values()), None) or ("", None)) if self.module_stack else ("", None)
        )
        inside = f"in {module} ({kind.__name__})" if kind else "in its forward"
        return f"{inside}, {place[0]}: `{place[1]}`" if place else inside

    _user_line = staticmethod(user_line)
