"""Captures a model in one mode, with shapes, and nothing else: what an analysis needs, in one sweep."""

import copy
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxsparse.capture.concrete_tracer import ConcreteTracer
from fxsparse.capture.meta_values import MetaEvaluator, is_on_meta
from fxsparse.core.errors import CaptureError
from fxsparse.core.records import META_KEY, Captured, NodeRecord, specs_of

from .annotate_shapes import annotate_shapes
from .trace import split_example, trace


def capture_annotated(model: nn.Module, example_input: Any, *, training: bool = False) -> Captured:
    """The graph of one mode (under both names), every node with its shapes; the model itself is looked at.

    The tracer computes every value on fake tensors anyway, so its values are the annotations. A model that
    it cannot take goes through `trace`, with whatever mechanisms that has.

    Args:
        model: any module; its training flags and attributes are put back.
        example_input: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        training: the mode to capture.

    Raises:
        CaptureError: what could not be captured: module, source line, reason.
    """
    args, kwargs = split_example(example_input)
    modes = {module: module.training for module in model.modules()}
    tracer = _Tracer(model)
    try:
        for module in modes:
            module.training = training
        graph = _on_meta_tensors(model, args, kwargs, training)
        if graph is None:
            graph, _ = tracer.capture(args, kwargs)
            _record_all(graph, tracer.results)
    except CaptureError as error:
        try:
            captured = trace(model, example_input)
        except CaptureError:
            raise CaptureError(f"{error}{tracer.shapes_at_failure()}") from error
        annotate_shapes(captured)
        graph = captured.graphs["train" if training else "eval"]
        graphs = {"train": graph, "eval": graph}
        return Captured(captured.name, captured.model, graphs, captured.example, "trace", units=captured.units)
    finally:
        for module, flag in modes.items():
            module.training = flag
    example = (specs_of(args), specs_of(kwargs))
    name = type(model).__name__
    if tracer.constants:  # tensors that the graph reads as attributes: of a root of its own, not of the user's
        model = copy.copy(model)
        model.__dict__.update(tracer.constants)
    return Captured(name, model, {"train": graph, "eval": graph}, example, "concrete")


def _on_meta_tensors(model: nn.Module, args: tuple, kwargs: dict[str, Any], training: bool) -> fx.Graph | None:
    """The annotated graph of a model that is on the meta device with its inputs, where plain meta kernels do.

    They cost a third of fake tensors. What they cannot do (a tensor made on another device) is left to those.
    """
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if training or not is_on_meta(model) or not all(tensor.is_meta for tensor in tensors):
        return None
    tracer = ConcreteTracer(model)
    tracer.values = MetaEvaluator(model)
    try:
        graph, _ = tracer.capture(args, kwargs)
    except CaptureError:
        return None
    if tracer.constants:
        return None
    _record_all(graph, tracer.results)
    return graph


class _Tracer(ConcreteTracer):
    """Remembers the node being made, for errors: one that fails is taken out of the graph again."""

    last: tuple[str, list[fx.Node]] | None = None

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        self.last = (node.name, node.all_input_nodes)
        return node

    def shapes_at_failure(self) -> str:
        """The last node, and the shapes that it was given."""
        name, inputs = self.last or ("", [])
        values = [self.results.get(source) for source in inputs]
        shapes = [str(tuple(value.shape)) for value in values if isinstance(value, Tensor)]
        return f" (node {name} is given the shapes {', '.join(shapes)})" if shapes else ""


def _record_all(graph: fx.Graph, values: dict[fx.Node, Any]) -> None:
    """Keeps the module path and the shapes of each node, and drops fx's own meta."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        path = next(reversed(stack.values()))[0] if stack else ""
        node.meta.clear()
        node.meta[META_KEY] = NodeRecord(module=path, spec=specs_of(values.get(node)))
