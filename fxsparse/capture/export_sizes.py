"""Sizes of an exported graph: which may change, and the nodes that refuse those for which it does not hold.

Every size of every input is asked to be dynamic. `torch.export` fixes those that the model needs fixed, and notes
conditions (`x.shape[2] % 4 == 0`) where forward, or an operation in it, decided by a size. Its own checks of them
are left out of the graph; these take their place, with the input's name and the line of the user's code.
"""

import math
import operator
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import sympy
import torch
from torch import Tensor, fx
from torch.export import Dim
from torch.utils import _pytree as pytree
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from ..core.errors import CaptureError
from ..core.input_checks import check_sizes, check_tensor
from .size_text import text_decides
from .user_code import user_line


def every_size_dynamic(arguments: dict[str, Any]) -> dict[str, Any]:
    """The `dynamic_shapes` of `torch.export` for arguments by name."""
    return pytree.tree_map(
        lambda leaf: dict.fromkeys(range(leaf.ndim), Dim.AUTO) if isinstance(leaf, Tensor) else None, dict(arguments)
    )


class _OnNodes(PythonReferenceAnalysis):
    """Arithmetic on sizes that records nodes."""

    @staticmethod
    def int_truediv(a: Any, b: Any) -> Any:
        return a / b

    truediv = int_truediv

    @staticmethod
    def trunc_to_int(x: Any, dtype: Any) -> Any:
        return _recorded(math.trunc, x)

    @staticmethod
    def floor_to_int(x: Any, dtype: Any) -> Any:
        return _recorded(math.floor, x)

    @staticmethod
    def ceil_to_int(x: Any, dtype: Any) -> Any:
        return _recorded(math.ceil, x)

    @staticmethod
    def round_to_int(x: Any, dtype: Any) -> Any:
        return _recorded(round, x)

    @staticmethod
    def not_(a: Any) -> Any:
        return operator.not_(a) if isinstance(a, bool) else a == False  # noqa: E712 - a node is not a bool


def _recorded(function: Callable, x: Any) -> Any:
    return x.tracer.create_proxy("call_function", function, (x,), {}) if isinstance(x, fx.Proxy) else function(x)


@contextmanager
def sizes_spelled_out() -> Iterator[None]:
    """A size that forward makes a text of, not only a message, is its number, which is then fixed."""
    plain = torch.SymInt.__repr__

    def text(size: torch.SymInt) -> str:
        return str(int(size)) if text_decides() else plain(size)

    with mock.patch.object(torch.SymInt, "__repr__", text):
        yield


class SizeChecks:
    """Writes the checks of one graph, after its placeholders."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._tracer = fx.proxy.GraphAppendingTracer(graph)
        self._sizes: dict[sympy.Symbol, fx.Node] = {}
        self._names: dict[sympy.Symbol, sympy.Symbol] = {}
        self._derived: list[tuple[sympy.Expr, fx.Node, str]] = []
        self._environment: Any = None

    def add_input(self, node: fx.Node, value: Tensor, name: str) -> None:
        """Checks one tensor, given the (symbolic) fake tensor that it was exported with."""
        sizes: list[int | None] = []
        exprs: dict[int, sympy.Expr] = {}
        for dim, size in enumerate(value.shape):
            expr: Any = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
            sizes.append(int(expr) if expr.is_number else None)
            if not expr.is_number:
                exprs[dim] = expr
                self._environment = size.node.shape_env  # type: ignore[attr-defined]
        self.graph.call_function(check_tensor, (node, tuple(sizes), value.dtype, value.device.type, name))
        for dim, expr in exprs.items():
            read = self.graph.call_method("size", (node, dim))
            text = f"{name}.shape[{dim}]"
            if expr.is_Symbol and expr not in self._sizes:
                self._sizes[expr], self._names[expr] = read, sympy.Symbol(text)
            else:
                self._derived.append((expr, read, text))

    def finish(self) -> None:
        """Checks what relates the sizes of the inputs to each other and to numbers.

        Raises:
            CaptureError: a condition on something that is no size of an input.
        """
        if self._environment is None:
            return
        for expr, size, text in self._derived:
            self._check(sympy.Eq(expr, sympy.Symbol(text), evaluate=False), "the model", {sympy.Symbol(text): size})
        seen = set()
        for guard in self._environment.guards:
            condition = self._environment.replace(guard.expr)
            if condition not in seen and condition is not sympy.true:
                seen.add(condition)
                self._check(condition, _place(guard), {})
        for symbol in list(self._sizes):
            bounds = self._environment.var_to_range[symbol]
            limits = [symbol >= bounds.lower] if bounds.lower > 0 else []
            limits += [symbol <= bounds.upper] if bounds.upper.is_Integer else []
            for condition in limits:
                if condition not in seen:
                    self._check(condition, "the model", {})

    def _check(self, condition: Any, place: str, more: dict[sympy.Symbol, fx.Node]) -> None:
        known = {symbol: fx.Proxy(node, self._tracer) for symbol, node in (self._sizes | more).items()}
        unknown = condition.free_symbols - known.keys()
        if unknown:
            raise CaptureError(f"{place} decides by {condition}, where {sorted(map(str, unknown))} is no input's size")
        holds = sympy_interp(_OnNodes, known, condition)
        if isinstance(holds, fx.Proxy):
            self.graph.call_function(check_sizes, (holds.node, _text(condition.xreplace(self._names)), place))


def _text(condition: Any) -> str:
    sign = {sympy.Eq: "==", sympy.Ne: "!="}.get(type(condition))
    return f"{condition.lhs} {sign} {condition.rhs}" if sign else str(condition)


def _place(guard: Any) -> str:
    """`file:line: source` of the decision, where it is in the user's code; else what torch knows of it."""
    location: Any = getattr(guard, "sloc", None)
    frame = getattr(location, "framework_loc", None)
    if getattr(location, "maybe_user_loc", None):
        return os.path.basename(str(location.maybe_user_loc))
    if isinstance(frame, traceback.FrameSummary):
        line = user_line(traceback.StackSummary.from_list([frame]))
        if line is not None:
            return f"{os.path.basename(line[0])}: `{line[1]}`"
        return f"an operation of the model ({frame.name})"
    return "an operation of the model"
