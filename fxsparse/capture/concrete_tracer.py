"""Captures a module's forward as an `fx.Graph`, with the example's values at hand.

`ConcreteTracer(model).capture(args, kwargs)` runs `forward` once on proxies that know the value each node
has for the example (`concrete_proxy.py`), computed on fake tensors (`fake_values.py`). Shape arithmetic is
recorded, control flow on shapes, flags and `None` resolves, control flow on tensor contents is refused.

What stays one call: modules that own no matrix-shaped parameter (dropout, activations, normalisation,
pooling, stochastic depth), which then behave by themselves in train and eval; and modules of `torch.nn`
that hide their weights in a kernel (GRU, LSTM, MultiheadAttention). Convolutions, linears and embeddings
are traced through, so that every weight appears as an operand.
"""

import inspect
import linecache
import operator
import os
import random
import traceback
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..core.arguments import check_argument, structure_is_constant, structure_of
from ..core.errors import CaptureError
from ..core.graphs import has_effect
from .concrete_proxy import ConcreteProxy, SizeTuple, is_plain
from .fake_values import FakeEvaluator
from .guards import module_state_kept, patched_python, randomness_unchanged

TRACED_THROUGH = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Embedding,
    nn.Sequential,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)
"""Modules of `torch.nn` with weights whose forward is recorded operation by operation."""

_SKIPPED_FRAMES = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module stays one call in the graph (see the head of this file)."""
    if all(parameter.ndim < 2 for parameter in module.parameters()):
        return True
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, TRACED_THROUGH)


class ConcreteTracer(fx.Tracer):
    """One capture of one module in its present mode. Use a new tracer for every capture."""

    proxy_buffer_attributes = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.values = FakeEvaluator(model)
        self.results: dict[fx.Node, Any] = {}
        self._names = {id(t): name for name, t in (*model.named_buffers(), *model.named_parameters())}
        self._attribute_proxies: dict[str, Any] = {}
        self._location: tuple[str, str] | None = None

    # -- the one entry point ------------------------------------------------------------------------------

    def capture(self, args: tuple, kwargs: dict[str, Any]) -> tuple[fx.Graph, list[str]]:
        """The graph of `model.forward`, and the plain attributes that forward would have changed.

        Args:
            args, kwargs: the example's arguments; tensors real, fake or on meta.

        Raises:
            CaptureError: naming the submodule, the line of the user's code and the reason.
        """
        self._example = inspect.signature(self.model.forward).bind(*args, **kwargs)
        title = type(self.model).__name__
        try:
            with (
                randomness_unchanged(title),
                module_state_kept(self.model, self._is_same_buffer) as changed,
                patched_python(self),
            ):
                graph = self.trace(self.model)
        except CaptureError:
            raise
        except Exception as error:
            raise self._explained(error) from error
        if changed["buffers"]:
            raise CaptureError(
                f"cannot capture {title}: forward assigns the buffer {changed['buffers'][0]} anew, which a graph "
                "cannot do; change it in place (buffer.copy_(...))"
            )
        graph._tracer_cls = None  # a graph of ordinary nodes from here on: nothing of this tracer goes along
        _drop_unused_arithmetic(graph)
        return graph, changed["attributes"]

    # -- hooks that fx.Tracer calls -----------------------------------------------------------------------

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def call_module(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        if self.values.running:  # inside a leaf whose value is being computed
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if self.values.running or not isinstance(attr_val, Tensor) or id(attr_val) not in self._names:
            return attr_val
        name = self._names[id(attr_val)]
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
            elif parameter.kind is parameter.KEYWORD_ONLY:
                keyword[parameter.name] = value
            else:
                positional.append(value)
        return lambda: self.model.forward(*positional, **keyword), []

    def create_arg(self, a: Any) -> Any:
        if type(a) is ConcreteProxy:
            return a.node
        if type(a) in (SizeTuple, torch.Size):
            return tuple(self.create_arg(element) for element in a)
        if isinstance(a, Tensor) and id(a) in self._names:
            return self.getattr("", a, {}).node
        return super().create_arg(a)

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
        if not torch.is_grad_enabled() and not self.values.running:
            raise self.refused("a no_grad region inside forward would be lost; use .detach() on its result")
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs), name, type_expr)
        self._location = self._user_line(traceback.extract_stack())
        return self._wrapped(node, self._evaluate(node))

    # -- values -------------------------------------------------------------------------------------------

    def _evaluate(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.results.__getitem__)
        if node.op != "call_module":
            return self.values.run(node.op, node.target, args, kwargs)
        python_random = random.getstate()
        try:
            return self.values.run(node.op, node.target, args, kwargs)
        finally:
            random.setstate(python_random)

    def _wrapped(self, node: fx.Node, value: Any) -> Any:
        self.results[node] = value
        if is_plain(value):
            if not has_effect(node):
                self.graph.erase_node(node)
            return value
        if isinstance(value, torch.Size):
            return SizeTuple(ConcreteProxy(node, self, value)[i] for i in range(len(value)))
        return ConcreteProxy(node, self, value)

    def _is_same_buffer(self, buffer: Tensor | None, now: Any) -> bool:
        """`self.calls += 1` assigns the buffer to itself: what stands there is a proxy of its twin."""
        return now is buffer or (
            type(now) is ConcreteProxy and buffer is not None and now.value is self.values.twin(buffer)
        )

    def _placeholder(self, parameter: inspect.Parameter) -> Any:
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        empty = {"*": (), "**": {}}.get(stars, parameter.default)
        example = self._example.arguments.get(parameter.name, empty)
        has_default = not stars and parameter.default is not parameter.empty
        # Without `*`, the generated forward lists keyword-only parameters after those with defaults.
        default = parameter.default if has_default else None
        optional = has_default or parameter.kind is parameter.KEYWORD_ONLY
        if isinstance(default, Tensor) or not (is_plain(default) or isinstance(default, (int, float, tuple))):
            default = None
        node = self.create_node(
            "placeholder", stars + parameter.name, (default,) if optional else (), {}, parameter.name
        )
        value = self.values.twins(example)
        self.results[node] = value
        if not isinstance(value, Tensor):
            structure = structure_of(value)
            self.create_node("call_function", check_argument, (node, structure, parameter.name), {})
        return value if structure_is_constant(value) else ConcreteProxy(node, self, value)

    # -- errors -------------------------------------------------------------------------------------------

    def refused(self, reason: str) -> CaptureError:
        """The error for something that a graph cannot hold, at the line of user code being traced."""
        place = self._user_line(traceback.extract_stack())
        return CaptureError(f"cannot capture {type(self.model).__name__}: {self._where(place)}: {reason}")

    def data_dependent(self, reason: str) -> CaptureError:
        return self.refused(f"{reason}, so the graph would only be right for the example")

    def _explained(self, error: Exception) -> CaptureError:
        place = self._user_line(_summary(error.__traceback__)) or self._location
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if isinstance(error, torch._subclasses.fake_tensor.UnsupportedFakeTensorException | RuntimeError) and (
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

    @staticmethod
    def _user_line(frames: traceback.StackSummary) -> tuple[str, str] | None:
        """`file:line` and source text of the innermost frame outside torch and this package."""
        for frame in reversed(frames):
            if not frame.filename.startswith(_SKIPPED_FRAMES) and not frame.filename.startswith("<"):
                line = linecache.getline(frame.filename, frame.lineno or 0).strip()
                return f"{frame.filename}:{frame.lineno}", line
        return None


def _summary(trace: TracebackType | None) -> traceback.StackSummary:
    return traceback.extract_tb(trace)


_ARITHMETIC = frozenset(
    getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "getitem")
)


def _drop_unused_arithmetic(graph: fx.Graph) -> None:
    """Removes size queries, arithmetic on sizes and attribute reads that nothing uses. Nothing else:
    general dead code elimination would remove normalisation calls and in-place operations that matter."""
    for node in reversed(list(graph.nodes)):
        removable = (
            node.op == "get_attr"
            or (node.op == "call_method" and node.target == "size")
            or (node.op == "call_function" and (node.target is getattr or node.target in _ARITHMETIC))
        )
        if removable and not node.users:
            graph.erase_node(node)
