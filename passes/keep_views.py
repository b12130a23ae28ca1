"""Gives tensors that somebody takes a `view` of, or sees outside the graph, the layout that the masked graph gave them.

Results of lowered layers have channels outermost, and what follows keeps that. A `view` wants its input's dimensions
side by side in memory, and fails otherwise; so does code that the graph does not look into.
"""

from torch import fx, nn

from fxsparse.core.graphs import IN_PLACE_OPERATORS, attribute, operation_name
from fxsparse.core.records import TensorSpec, record_of, update_record
from fxsparse.kernels.calls import lowered_conv, lowered_linear
from fxsparse.kernels.semi_structured import semi_structured_conv

_LOWERED = (lowered_conv, lowered_linear, semi_structured_conv)
_WANT_STRIDES = frozenset("view view_as as_strided _unsafe_view view_as_complex view_as_real".split())
_ALIASES = _WANT_STRIDES | frozenset(
    "getitem reshape flatten unflatten transpose permute movedim swapaxes moveaxis t T mT squeeze unsqueeze expand "
    "expand_as narrow select chunk split unbind detach contiguous to type_as diagonal slice alias swapdims ravel "
    "reshape_as identity getattr unfold tensor_split requires_grad_".split()
)


def keep_views(root: nn.Module, graph: fx.Graph) -> int:
    """Rewrites a lowered graph in place.

    Args:
        root: what the graph's submodules refer to.
        graph: with the shapes of the masked one.

    Returns:
        Number of tensors that are laid out anew.
    """
    follows: set[fx.Node] = set()  # what is computed from a lowered layer
    bases: dict[fx.Node, None] = {}
    outputs: dict[fx.Node, None] = {}
    for node in graph.nodes:
        sources = [source for source in node.all_input_nodes if source in follows]
        if node.op == "output":
            outputs.update(dict.fromkeys(sources))
        elif operation_name(node) in _WANT_STRIDES or _is_opaque(root, node):
            bases.update(dict.fromkeys(_base(root, source) for source in sources))
        if sources or node.target in _LOWERED:
            follows.add(node)
    own = [node for node in bases if node in follows and _has_layout(node)]
    for node in own:
        new = _laid_out(node)
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
    shown = [node for node in outputs if node not in own and _has_layout(node)]
    for node in shown:
        graph.output_node().replace_input_with(node, _laid_out(node))
    return len(own) + len(shown)


def _has_layout(node: fx.Node) -> bool:
    spec = record_of(node).spec
    return isinstance(spec, TensorSpec) and len(spec.shape) > 1


def _laid_out(node: fx.Node) -> fx.Node:
    with node.graph.inserting_after(node):
        new = node.graph.call_method("contiguous", (node,))
    update_record(new, module=record_of(node).module, spec=record_of(node).spec)
    return new


def _is_opaque(root: nn.Module, node: fx.Node) -> bool:
    if record_of(node).opaque:
        return True
    return node.op == "call_module" and not type(attribute(root, str(node.target))).__module__.startswith("torch.nn")


def _base(root: nn.Module, node: fx.Node) -> fx.Node:
    """The node that made the memory that a node's result lies in, as far as names tell."""
    while node.all_input_nodes and _shares_memory(root, node):
        node = node.all_input_nodes[0]
    return node


def _shares_memory(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = attribute(root, str(node.target))
        return bool(getattr(module, "inplace", False)) or isinstance(module, (nn.Flatten, nn.Identity, nn.Unflatten))
    name = operation_name(node)
    in_place = name in IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    return in_place or name in _ALIASES or bool(node.kwargs.get("inplace"))
