"""Replaces masked calls by sparse ones: `conv2d(x, apply_mask(weight, mask))` -> `lowered_conv(x, values, pattern)`."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from fxsparse.core.graphs import copy_graph, operand
from fxsparse.core.masking import apply_mask
from fxsparse.core.records import record_of, update_record
from fxsparse.kernels.calls import lowered_conv, lowered_linear

from .find_lowerable import SparseCall

RUN = "lowered_run"
"""Attribute of the module that the graph belongs to: under which number update steps remember activations."""

PATTERN_BUFFERS = ("starts", "columns", "t_starts", "t_rows", "t_places")
"""What a pattern's tensors are called, after the parameter's name."""


def pattern_names(weight: str) -> list[str]:
    """Qualified names of the buffers that hold the pattern of a weight."""
    return [f"{weight}_{buffer}" for buffer in PATTERN_BUFFERS]


def lower_weights(
    graph: fx.Graph, mode: str, calls: Mapping[str, Sequence[SparseCall]], blocks: Mapping[str, int]
) -> fx.Graph:
    """A copy of a masked graph in which the calls of some sites compute with their active weights alone.

    The site's parameter then holds the active values, and the buffers `pattern_names` their places.

    Args:
        graph: of `mode`, masked.
        calls: site -> its calls, as of `find_lowerable`.
        blocks: site -> output channels that share a pattern.
    """
    lowered = copy_graph(graph)
    nodes = {node.name: node for node in lowered.nodes}
    for masked in list(lowered.find_nodes(op="call_function", target=apply_mask)):
        weight, mask, gate = masked.args
        if weight.target not in calls:
            continue
        name = str(weight.target)
        with lowered.inserting_after(mask):
            pattern = [lowered.create_node("get_attr", buffer) for buffer in pattern_names(name)]
        run = _run_number(lowered, gate)
        for call in calls[name]:
            if call.mode == mode:
                _replace(nodes[call.node], call, weight, pattern, gate, run, blocks[name])
        lowered.erase_node(masked)
        if not mask.users:
            lowered.erase_node(mask)
    lowered.lint()
    return lowered


def _run_number(graph: fx.Graph, before: fx.Node) -> fx.Node:
    for node in graph.find_nodes(op="get_attr", target=RUN):
        return node
    with graph.inserting_before(before):
        return graph.create_node("get_attr", RUN)


def _replace(
    node: fx.Node,
    call: SparseCall,
    weight: fx.Node,
    pattern: list[fx.Node],
    gate: fx.Node,
    run: fx.Node,
    block: int,
) -> None:
    bias = operand(node, 2, "bias")
    common = (operand(node, 0, "input"), weight, pattern, bias, gate, run, call.key)
    settings: tuple[Any, ...] = (call.weight, call.stride, call.padding, call.dilation, call.groups, block)
    with node.graph.inserting_after(node):
        if call.linear:
            new = node.graph.call_function(lowered_linear, (*common, call.weight[:2], block))
        else:
            new = node.graph.call_function(lowered_conv, (*common, *settings))
    update_record(new, module=record_of(node).module, spec=record_of(node).spec)
    node.replace_all_uses_with(new)
    graph, old = node.graph, node.name
    graph.erase_node(node)
    new.name = old
