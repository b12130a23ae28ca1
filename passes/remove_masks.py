"""Folding: takes the `apply_mask` nodes out of a graph; the zeros then stand in the weights alone."""

from torch import fx

from fxsparse.core.graphs import copy_graph
from fxsparse.core.masking import apply_mask


def remove_masks(graph: fx.Graph) -> fx.Graph:
    """A copy of `graph` in which every user of a masked weight reads the weight itself."""
    folded = copy_graph(graph)
    for node in list(folded.nodes):
        if node.op == "call_function" and node.target is apply_mask:
            weight, mask, gate = node.args
            node.replace_all_uses_with(weight)
            folded.erase_node(node)
            for source in (mask, gate):
                if not source.users:
                    folded.erase_node(source)
    return folded
