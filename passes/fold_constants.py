"""Moves what constant channels contribute into the biases that read them, where that is exact.

A channel of zeros contributes nothing. Another constant does where no padding stands between it and its reader,
the reader has a bias of its own, and the constant is the same in both modes. The weights that read a channel whose
contribution has been moved become 0, so that nothing reads it any more.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx

from fxsparse.core.channel_labels import LabelSource
from fxsparse.core.graphs import operand
from fxsparse.core.labelled_model import LabelledModel, TensorReference
from fxsparse.core.operations import WEIGHTED

from .find_constants import channel_values, find_constants, is_padded


@torch.no_grad()
def fold_constants(labelled: LabelledModel) -> bool:
    """Changes weights and biases of the labelled model in place.

    Returns:
        Whether anything was moved.
    """
    graphs = labelled.captured.graphs  # one graph may be both modes', and give other constants in each
    constants = {mode: find_constants(labelled, mode) for mode in graphs}
    uses: dict[str, list[tuple[str, fx.Node]]] = defaultdict(list)
    readers: dict[str, int] = defaultdict(int)
    for mode, graph in graphs.items():
        for node in graph.nodes:
            if node.op == "get_attr":
                readers[str(node.target)] += len(node.users)
            elif node.op == "call_function" and node.target in WEIGHTED:
                reference = _reference(labelled, mode, operand(node, WEIGHTED[node.target].weight, "weight"))
                if reference is not None:
                    uses[reference.name].append((mode, node))
    changed = False
    for name, nodes in uses.items():
        weight = labelled.captured.model.get_parameter(name)
        values = [_read(constants[mode], node) for mode, node in nodes]
        dim = 0 if "transpose" in WEIGHTED[nodes[0][1].target].name else 1
        source = LabelSource(name, dim)
        known = [value for value in values if value is not None]
        if len(known) < len(values) or source not in labelled.space.blocks or weight.is_meta:
            continue
        labels = labelled.space.labels(source, labelled.space.blocks[source][1])
        if any(len(value) != len(labels) for value in known):
            continue  # groups
        active = labelled.active_elements(name)
        free = ~labelled.space.stays[labels] & active.movedim(dim, 0).flatten(1).any(1).cpu()
        zero = torch.stack([value == 0 for value in known]).all(0)
        same = torch.stack([(value - known[0]).abs() <= 1e-12 * known[0].abs() for value in known]).all(0)
        bias = _own_bias(labelled, nodes, len(graphs), readers)
        movable = free & (zero | (same if bias is not None else torch.zeros_like(same)))
        index = movable.nonzero().reshape(-1).to(weight.device)
        if not len(index):
            continue
        if bias is not None:
            columns = weight.index_select(1, index).flatten(2).sum(2) if weight.ndim > 2 else weight[:, index]
            added = columns.double() @ known[0][movable].to(weight.device)
            bias.copy_(bias.double() + added)
        weight.index_fill_(dim, index, 0)
        labelled.active[name] = active.clone().index_fill_(dim, index, False)
        changed = True
    return changed


def _reference(labelled: LabelledModel, mode: str, node: Any) -> TensorReference | None:
    value = labelled.nodes.get(mode, labelled.nodes["eval"])[node.name] if isinstance(node, fx.Node) else None
    return value if isinstance(value, TensorReference) else None


def _read(constants: dict[str, Any], node: fx.Node) -> Tensor | None:
    """One constant a channel that a call reads, with NaN for those that cannot be moved out of it."""
    operation = WEIGHTED[node.target]
    input = operand(node, 0, "input")
    value = constants.get(input.name)
    if not isinstance(value, Tensor):
        return None
    channel = value.ndim - operation.kernel_rank - 1
    known = channel_values(constants, input, channel)
    if known is not None and (is_padded(node) or "transpose" in operation.name):
        return torch.where(known == 0, known, torch.nan)
    return known


def _own_bias(
    labelled: LabelledModel, nodes: list[tuple[str, fx.Node]], modes: int, readers: dict[str, int]
) -> Tensor | None:
    """The bias of a weight that is used once a mode; None where another call reads either."""
    mode, node = nodes[0]
    operation = WEIGHTED[node.target]
    found = [operand(own, operation.bias, "bias") for _, own in nodes]
    names = {bias.target for bias in found if isinstance(bias, fx.Node) and bias.op == "get_attr"}
    if len(nodes) != modes or len(names) != 1 or readers[str(next(iter(names)))] != modes:
        return None
    reference = _reference(labelled, mode, found[0])
    return labelled.captured.model.get_parameter(reference.name) if reference is not None else None
