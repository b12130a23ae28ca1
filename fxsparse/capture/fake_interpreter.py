"""Runs a whole graph on fake tensors, for passes that need every node's value but none of its contents."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from ..core.errors import InputError
from ..core.records import record_of
from .fake_values import FakeEvaluator, example_tensors


class FakeInterpreter(fx.Interpreter):
    """An `fx.Interpreter` without arithmetic or side effects; subclasses look at nodes in `run_node`."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, garbage_collect_values=True, graph=graph)
        self.values = FakeEvaluator(root)
        self.extra_traceback = False  # InputError says where

    def run_example(self, example: tuple[tuple, dict[str, Any]]) -> Any:
        """Runs the graph on tensors of the example's shapes and returns its (fake) output.

        Raises:
            InputError: naming the first node that fails and the shapes there.
        """
        with self.values.mode:
            args, kwargs = example_tensors(example)
        self._arguments = _bind(self.graph, args, kwargs)
        return self.run()

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            return self._arguments[n]
        if n.op == "output":
            return super().run_node(n)
        if record_of(n).opaque:
            with self.values.mode:
                return example_tensors(record_of(n).spec)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        try:
            return self.values.run(n.op, n.target, args, kwargs)
        except Exception as error:
            if n.target is torch.autograd.grad and not n.kwargs.get("is_grads_batched"):
                return _like_inputs(args, kwargs)
            raise InputError(_failure(n, args, error)) from error


def _like_inputs(args: tuple, kwargs: dict[str, Any]) -> tuple:
    """What `autograd.grad` returns, by shape: a record of an example has no `requires_grad`."""
    inputs = args[1] if len(args) > 1 else kwargs["inputs"]
    return tuple(torch.empty_like(value) for value in ([inputs] if isinstance(inputs, Tensor) else inputs))


def _bind(graph: fx.Graph, args: tuple, kwargs: dict[str, Any]) -> dict[fx.Node, Any]:
    """What each placeholder receives when the captured forward is called with `args` and `kwargs`."""
    positional = list(args)
    named = dict(kwargs)
    values: dict[fx.Node, Any] = {}
    for node in graph.find_nodes(op="placeholder"):
        name = str(node.target)
        if name.startswith("**"):
            values[node] = named
        elif name.startswith("*"):
            values[node], positional = tuple(positional), []
        elif name in named:
            values[node] = named.pop(name)
        elif positional:
            values[node] = positional.pop(0)
        else:
            values[node] = node.args[0] if node.args else None
    return values


def _failure(node: fx.Node, args: tuple, error: Exception) -> str:
    shapes = ", ".join(str(tuple(a.shape)) for a in args if isinstance(a, Tensor))
    place = f" in {record_of(node).module}" if record_of(node).module else ""
    reason = str(error).strip().split("\n")[0]
    return f"node {node.name}{place} fails for inputs of shape {shapes or 'none'}: {reason}"
