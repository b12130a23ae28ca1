"""Takes out of a graph what nothing reads: rearrangements, averages and elementwise work on tensors.

An analysis asks what a value is used for; a mean over the heads that attention computes and nobody looks at would count
as a use. Calls that may do more than compute their result stay.
"""

from torch import fx, nn

from fxsparse.core.channel_rules import channel_rule
from fxsparse.core.graphs import has_effect
from fxsparse.core.records import Captured

PURE = ("movement", "reduction")


def drop_unread(captured: Captured) -> bool:
    """Takes unread nodes out of all graphs.

    Returns:
        Whether anything changed.
    """
    changed = False
    for _, graph in captured.distinct_graphs():
        for node in reversed(list(graph.nodes)):
            if not node.users and _is_pure(captured.model, node):
                graph.erase_node(node)
                changed = True
    return changed


def _is_pure(root: nn.Module, node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or has_effect(node):
        return False
    rule = channel_rule(root, node)
    return rule is not None and (rule.kind in PURE or (rule.kind == "elementwise" and rule.constant))
