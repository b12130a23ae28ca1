"""`count_flops`: from a model, a `SparseModule` or a plan of densities to a `FlopReport`."""

import inspect
import traceback
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from ..capture.concrete_tracer import ConcreteTracer
from ..capture.user_code import user_line
from ..captured_module import CapturedModule
from ..channels.compaction import removable
from ..core.errors import CaptureError, InputError
from ..core.graphs import copy_graph
from ..core.records import Captured, TensorSpec, record_of, specs_of
from ..core.units import Units
from ..passes.annotate_shapes import annotate_shapes
from ..passes.capture_annotated import capture_annotated
from ..passes.compact_channels import never_empty
from ..passes.count_flops import count_flops as count_nodes
from ..passes.count_structured import count_parameters, count_structured
from ..passes.count_units import count_units
from ..passes.trace import split_example
from .flop_report import FlopReport


def count_flops(
    model: nn.Module,
    example_input: Any = None,
    *,
    training: bool = False,
    stored_zeros: bool = False,
    structured: bool = False,
    also: tuple[str, ...] = (),
    convention: str = "macs",
) -> FlopReport:
    """Counts a forward pass for the sizes of `example_input`, without running the model.

    Args:
        model: any module that can be captured, or a `SparseModule`, which is counted at its present densities.
        example_input: as for `sparsify`; a captured module has its own and needs none.
        training: count the graph of train mode (auxiliary heads, batch statistics) instead of eval mode.
        stored_zeros: where a weight has no mask, count its stored zeros as inactive, as after `fold()`.
        structured: of a captured module, count what is left without the channels that no active weight reads, at the
            sizes that `compact` cuts it to; weights that are masked inside what is left count.
        also: categories of other arithmetic that `FlopReport.flops` includes.
        convention: `"macs"`, or `"micronet"` for the paper's own way of counting.

    Raises:
        CaptureError: the model cannot be captured: where, and why.
        InputError: a node fails for these shapes: which, and the shapes there.
        ConfigError: an unknown category or convention.
    """
    if isinstance(model, CapturedModule):
        if structured and example_input is not None:
            raise InputError("structured: counts the example of the capture; leave out example_input")
        mode = "train" if training else "eval"
        graph, example = model.graphs[mode], model.example
        if example_input is not None:
            args, kwargs = split_example(example_input)
            given = (specs_of(args), specs_of(kwargs))
            if given != example and model.units is not None:
                raise InputError(
                    f"example_input: {model._get_name()} has submodules kept as one call, whose calls are known "
                    "for the example it was captured with only; capture it again with this one"
                )
            if given != example:
                graph, example = copy_graph(graph), given
                annotate_shapes(Captured("", model, {"train": graph, "eval": graph}, example, ""))
        active = dict(getattr(model, "active_counts", {}))
        if structured:
            return _structured(model, training, stored_zeros).under(convention, also)
        active = _with_stored_zeros(model, active) if stored_zeros else active
        report = _report(model, graph, active, training, model.units)
    else:
        if example_input is None:
            raise InputError(f"example_input: {type(model).__name__} is not captured yet; give an input that it takes")
        if structured:
            raise InputError(f"structured: {type(model).__name__} is not captured; it has no masks to go by")
        captured = capture_annotated(model, example_input, training=training)
        active = _with_stored_zeros(captured.model, {}) if stored_zeros else {}
        report = count_captured(captured, model, example_input, active, training=training)
    return report.under(convention, also)


def count_captured(
    captured: Captured,
    model: nn.Module,
    example_input: Any,
    active: Mapping[str, int] | None = None,
    *,
    training: bool = False,
) -> FlopReport:
    """The cost of a model that was captured with shapes just now; `model` is asked for lines of code only."""
    report = _report(captured.model, captured.graphs["eval"], active or {}, training, captured.units)
    if report.unknown:
        report = replace(report, places=_places_by_line(model, example_input, report))
    return report


def count_module(module: CapturedModule, active: Mapping[str, int]) -> FlopReport:
    """The cost of a captured module at the given active counts, for the example it was captured with."""
    return _report(module, module.graphs["eval"], active, False, module.units)


def _structured(model: CapturedModule, training: bool, stored_zeros: bool) -> FlopReport:
    """The count at the sizes that the channels which masks have left dead leave."""
    labelled, gone = removable(model, None, (), stored_zeros)
    gone = never_empty(labelled, gone)
    mode = "train" if training else "eval"
    nodes = tuple(count_structured(labelled, mode, gone, training=training))
    graph = labelled.captured.graphs[mode]
    links = _links(graph, {node.node for node in nodes})
    return FlopReport(nodes, count_parameters(labelled, gone), links=links)


def _report(
    root: nn.Module, graph: fx.Graph, active: Mapping[str, int], training: bool, units: Units | None
) -> FlopReport:
    inside = count_units(root, units, active, training=training)
    nodes = (*count_nodes(root, graph, active, training=training), *inside)
    parameters = sum(parameter.numel() for parameter in root.parameters())
    places = {node.node: _place_of(root, node.module) for node in nodes if node.unknown}
    return FlopReport(nodes, parameters, places=places, links=_links(graph, {node.node for node in nodes}))


def _links(graph: fx.Graph, costing: set[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Inputs, outputs, nodes that cost something and joins, each with the nearest such nodes before it."""
    before: dict[fx.Node, dict[str, None]] = {}
    links = []
    for node in graph.nodes:
        sources: dict[str, None] = {}
        for source in node.all_input_nodes:
            if _holds_tensor(source):
                sources |= before[source]
        shown = node.name in costing or node.op in ("placeholder", "output") or len(sources) > 1
        if shown and (sources or node.op == "placeholder"):
            links.append((node.name, tuple(sources)))
            before[node] = {node.name: None}
        else:
            before[node] = sources
    return tuple(links)


def _holds_tensor(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(record_of(node).spec, is_leaf=lambda leaf: isinstance(leaf, TensorSpec))
    return any(isinstance(leaf, TensorSpec) for leaf in leaves)


def _with_stored_zeros(root: nn.Module, active: Mapping[str, int]) -> dict[str, int]:
    counts = dict(active)
    for name, parameter in root.named_parameters():
        if name not in counts and parameter.ndim >= 2 and not parameter.is_meta:
            counts[name] = int(parameter.count_nonzero())
    return counts


def _place_of(root: nn.Module, module: str) -> str:
    """`file:line` of the forward that makes the call."""
    cls = type(root.get_submodule(module))
    try:
        return f"{inspect.getsourcefile(cls.forward)}:{inspect.getsourcelines(cls.forward)[1]} ({cls.__name__})"
    except (OSError, TypeError):
        return cls.__name__


def _places_by_line(model: nn.Module, example_input: Any, report: FlopReport) -> dict[str, str]:
    """Captures once more, noting the line of code of every node."""
    args, kwargs = split_example(example_input)
    tracer = _LineTracer(model)
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        tracer.capture(args, kwargs)
    except CaptureError:
        return dict(report.places)
    finally:
        for module, flag in modes.items():
            module.training = flag
    return {name: tracer.lines.get(name, report.places.get(name, "")) for name in report.unknown}


class _LineTracer(ConcreteTracer):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.lines: dict[str, str] = {}

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
        place = user_line(traceback.StackSummary.from_list(frames))
        if place is not None:
            self.lines[node.name] = f"{place[0]}: `{place[1]}`"
        return node
