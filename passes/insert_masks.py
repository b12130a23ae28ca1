"""Sends every use of a site's weight through `apply_mask(weight, mask)`."""

from collections.abc import Sequence

from torch import fx

from fxsparse.core.errors import SelectionError
from fxsparse.core.graphs import operand
from fxsparse.core.masking import apply_mask
from fxsparse.core.operations import WEIGHTED
from fxsparse.core.records import Captured, WeightSite, record_of, update_record

GATE = "dense_gradient"
"""Attribute of the module that the graph belongs to: whether `weight.grad` is dense in this step."""


def insert_masks(captured: Captured, sites: Sequence[WeightSite]) -> bool:
    """Rewrites `weight -> f` into `weight -> apply_mask(weight, mask, dense_gradient) -> f` in every graph.

    Every use of the parameter goes through the one mask: a tied weight, a module called twice, and an
    embedding that shares the parameter. The masks are read from the buffers `<name>_mask`, the flag from
    the attribute `dense_gradient`; `SparseModule` holds both.

    Returns:
        Whether anything changed.

    Raises:
        SelectionError: a module that has such a mask already.
    """
    for site in sites:
        owner, _, existing = site.mask_name.rpartition(".")
        if hasattr(captured.model.get_submodule(owner), existing):
            raise SelectionError(
                f"{site.mask_name} already exists: is the model sparsified or pruned already? Start from the plain one"
            )
    masks = {site.name: site.mask_name for site in sites}
    changed = False
    for _, graph in captured.all_graphs():
        gate: fx.Node | None = None
        for weight in [node for node in graph.nodes if node.op == "get_attr" and node.target in masks]:
            with graph.inserting_after(weight):
                mask = graph.create_node("get_attr", masks[str(weight.target)])
            if gate is None:
                with graph.inserting_before(mask):
                    gate = graph.create_node("get_attr", GATE)
            with graph.inserting_after(mask):
                masked = graph.create_node(
                    "call_function", apply_mask, (weight, mask, gate), name=f"{weight.name}_masked"
                )
            module = str(weight.target).rpartition(".")[0]
            update_record(mask, module=module)
            update_record(masked, module=module, spec=record_of(weight).spec)
            weight.replace_all_uses_with(masked, delete_user_cb=lambda user, own=masked: user is not own)
            if all(_is_only_weight(masked, user) for user in masked.users):
                masked.update_kwarg("own_gradient", True)
            changed = True
    return changed


def _is_only_weight(masked: fx.Node, user: fx.Node) -> bool:
    """Whether `user` is a convolution or linear whose weight, and nothing else, is `masked`."""
    if user.target not in WEIGHTED or operand(user, WEIGHTED[user.target].weight, "weight") is not masked:
        return False
    return [*user.args, *user.kwargs.values()].count(masked) == 1
