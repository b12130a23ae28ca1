"""Counts what the units inside of opaque submodules cost: every recorded call of each."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from fxsparse.core.graphs import copy_graph
from fxsparse.core.records import Captured
from fxsparse.core.units import Call, Units

from .annotate_shapes import annotate_shapes
from .count_flops import NodeCost, count_flops


def count_units(
    root: nn.Module, units: Units | None, active: Mapping[str, int], *, training: bool = False
) -> list[NodeCost]:
    """The cost of every node of every unit, once a call of the example.

    Nodes of a unit's second call are called `<node>#2`, and so on. What an opaque submodule computes by itself is
    not in it; `count_flops` lists that call as unknown.

    Args:
        root: what the graphs' attributes and submodules refer to.
        units: of the captured model; None where everything was traced.
        active: parameter name -> number of active weights.
        training: count the calls of train mode.
    """
    costs: list[NodeCost] = []
    mode = "train" if training else "eval"
    for name, graph in units.graphs[mode].items() if units is not None else ():
        counted: list[tuple[Call, list[NodeCost]]] = []
        for index, call in enumerate(units.calls[mode].get(name, []) if units is not None else ()):
            known = next((own for seen, own in counted if seen == call), None)
            if known is None:
                own_graph = copy_graph(graph)
                annotate_shapes(Captured("", root, {"train": own_graph, "eval": own_graph}, call, ""))
                known = count_flops(root, own_graph, active, training=training)
                counted.append((call, known))
            costs += known if index == 0 else [replace(cost, node=f"{cost.node}#{index + 1}") for cost in known]
    return costs
