"""Masks norm-coupled channels: everything of theirs becomes 0, if a norm may then lose them."""

import torch
from torch import Tensor

from fxsparse.core.channel_rules import channel_rule
from fxsparse.core.errors import SelectionError
from fxsparse.core.labelled_model import LabelledModel

from .find_zeros import NORMS, nonzero_at_norm


@torch.no_grad()
def zero_channels(labelled: LabelledModel, coupled: Tensor) -> None:
    """Changes parameters of the labelled model in place, and takes their elements as masked.

    Args:
        coupled: bool, one a label: channels that norms mix with others.

    Raises:
        SelectionError: something else mixes them too, or they are not 0 before a norm for all that.
    """
    for label in coupled.nonzero().reshape(-1).tolist():
        for name in labelled.space.couplings.get(label, ()):
            if not _is_norm(labelled, name):
                raise SelectionError(
                    f"remove: a norm-coupled channel is mixed with others by node {name}, which is no LayerNorm, "
                    "RMSNorm or GroupNorm, so it cannot be written for fewer channels"
                )
    model, space = labelled.captured.model, labelled.space
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for source, (_, shape) in space.blocks.items():
        own = coupled[space.labels(source, shape)]
        if source.kind != "tensor" or source.name not in parameters or not bool(own.any()):
            continue
        parameter = parameters[source.name]
        if source.dim is None:
            parameter.masked_fill_(own.to(parameter.device), 0)
            continue
        index = own.nonzero().reshape(-1).to(parameter.device)
        parameter.index_fill_(source.dim, index, 0)
        active = labelled.active_elements(source.name).clone()
        labelled.active[source.name] = active.index_fill_(source.dim, index, False)
    for mode in labelled.captured.graphs:
        norm = nonzero_at_norm(labelled, mode, coupled)
        if norm is not None:
            raise SelectionError(
                f"remove: with everything of theirs masked, norm-coupled channels are not 0 at node {norm} of the "
                f"{mode} graph, so the norm cannot be written without them"
            )


def _is_norm(labelled: LabelledModel, name: str) -> bool:
    """Whether every node of this name, in whatever mode, is a norm that can be written for fewer channels."""
    found = [node for _, graph in labelled.captured.distinct_graphs() for node in graph.nodes if node.name == name]
    rules = [channel_rule(labelled.captured.model, node) for node in found]
    return bool(rules) and all(rule is not None and rule.kind in NORMS for rule in rules)
