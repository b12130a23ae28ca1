"""Which sites are linears, or 1x1 convolutions that are linears, in the eval graph; and why the others are not."""

from collections.abc import Sequence

from torch import fx

from fxsparse.core.graphs import attribute
from fxsparse.core.masking import apply_mask
from fxsparse.core.operations import FUSED
from fxsparse.core.records import Captured, WeightSite

from .find_lowerable import SparseCall, call_of, names_in_units


def find_semi_structured(
    captured: Captured, sites: Sequence[WeightSite]
) -> tuple[dict[str, list[SparseCall]], dict[str, str]]:
    """Sorts the sites of masked graphs, annotated with shapes.

    Returns:
        Of each site whose calls are products with one (out, in) matrix those calls; of every other one the reason.
    """
    masked: dict[str, list[fx.Node]] = {site.name: [] for site in sites}
    for node in captured.graphs["eval"].find_nodes(op="call_function", target=apply_mask):
        masked[str(node.args[0].target)].append(node)
    hidden = names_in_units(captured)
    calls: dict[str, list[SparseCall]] = {}
    reasons: dict[str, str] = {}
    for site in sites:
        if site.name in hidden:
            reasons[site.name] = "it is used inside a submodule that stays one call"
        elif site.form or (site.matrix and site.matrix != site.shape) or site.aliases or site.tied_embedding:
            reasons[site.name] = "the weight is computed from its parameter, or shared"
        else:
            found = _calls_of(captured, site, masked[site.name])
            if isinstance(found, str):
                reasons[site.name] = found
            else:
                calls[site.name] = found
    return calls, reasons


def _calls_of(captured: Captured, site: WeightSite, masked: Sequence[fx.Node]) -> list[SparseCall] | str:
    shape = tuple(attribute(captured.model, site.name).shape)
    calls = []
    for node in masked:
        for user in node.users:
            if user.target in FUSED:
                return f"{FUSED[user.target].name} has no semi-structured kernel"  # type: ignore[index]
            call = call_of("eval", user, node, shape)
            if isinstance(call, str):
                return call
            if not call.linear and not _is_linear(call):
                return "a convolution is a linear where its kernel is 1x1, its stride 1, without groups and padding"
            calls.append(call)
    return calls or "no call in the graph of eval mode uses it"


def _is_linear(call: SparseCall) -> bool:
    return call.weight[2:] == (1, 1) and call.stride == (1, 1) and call.padding == (0, 0) and call.groups == 1
