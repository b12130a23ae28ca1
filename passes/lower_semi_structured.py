"""Replaces masked calls by ones with packed weights: `linear(x, apply_mask(w, mask))` -> `semi_structured_linear`."""

from collections.abc import Mapping, Sequence

from torch import fx

from fxsparse.core.graphs import copy_graph, operand
from fxsparse.core.records import record_of, update_record
from fxsparse.kernels.semi_structured import semi_structured_conv, semi_structured_linear

from .find_lowerable import SparseCall
from .remove_masks import remove_masks


def lower_semi_structured(graph: fx.Graph, calls: Mapping[str, Sequence[SparseCall]]) -> fx.Graph:
    """A copy of a masked eval graph without masks, in which the calls of some sites take packed weights.

    The attribute of such a site's name is then to be the packed (out, in) weight; those of all other sites keep their
    zeros in storage.

    Args:
        calls: site -> its calls, as of `find_semi_structured`.
    """
    lowered = copy_graph(graph)
    nodes = {node.name: node for node in lowered.nodes}
    for call in (call for found in calls.values() for call in found):
        node = nodes[call.node]
        operands = [operand(node, place, name) for place, name in enumerate(("input", "weight", "bias"))]
        with lowered.inserting_after(node):
            new = lowered.call_function(
                semi_structured_linear if call.linear else semi_structured_conv, tuple(operands)
            )
        update_record(new, module=record_of(node).module, spec=record_of(node).spec)
        node.replace_all_uses_with(new)
        lowered.erase_node(node)
        new.name = call.node
    lowered.lint()
    return remove_masks(lowered)
