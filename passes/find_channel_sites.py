"""Finds the channels that training may drop: the exact atoms all of whose weights are masked."""

from collections.abc import Collection, Sequence

from fxsparse.core.channel_records import Atom, ChannelGroup
from fxsparse.core.channel_sites import ON_WEIGHTS, ChannelSite, SiteSlices
from fxsparse.core.errors import SelectionError
from fxsparse.core.records import WeightSite

MAKES_THE_OUTPUT = "it is an output of the model"
"""Reason of a pinned atom by which the weights that make the model's outputs are known."""


def find_channel_sites(
    groups: Sequence[ChannelGroup], sites: Sequence[WeightSite], dense: Collection[str] = ()
) -> tuple[list[ChannelSite], dict[str, str]]:
    """The channel sites in execution order, and why channels of the other groups stay.

    Args:
        groups: of the analysis of the same model.
        sites: the weights that have masks; a channel that another weight makes or reads has to stay.
        dense: names of weights neither side of which shrinks.

    Returns:
        The sites, and first producer -> reason of every group of which some channel stays.

    Raises:
        SelectionError: no channel is left.
    """
    masked = {site.name for site in sites}
    order = {site.name: rank for rank, site in enumerate(sites)}
    found, reasons = [], {}
    for group in groups:
        atoms = []
        for atom in group.atoms:
            reason = atom.reason if atom.status != "exact" else _obstacle(atom, masked, dense)
            if reason:
                reasons.setdefault(group.name, reason)
            else:
                atoms.append(atom)
        if len(atoms) > 1:  # the only one always stays
            found.append(ChannelSite(f"channels of {group.name}", group.producers, len(atoms), _slices(atoms)))
    if not found:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3]) or "it makes none"
        raise SelectionError(f"no channel of this model can be dropped ({listed})")
    found.sort(key=lambda site: min(order[name] for name in site.producers))
    return found, reasons


def output_weights(groups: Sequence[ChannelGroup]) -> set[str]:
    """Names of the weights that make the model's outputs: the classifier."""
    return {
        name
        for group in groups
        if all(atom.reason == MAKES_THE_OUTPUT for atom in group.atoms)
        for name in group.producers
    }


def _obstacle(atom: Atom, masked: Collection[str], dense: Collection[str]) -> str:
    """Why an exact atom has to stay nevertheless; empty where it need not."""
    if not atom.of("consumer"):
        return "nothing reads it"
    for item in atom.slices:
        if item.role in ON_WEIGHTS and item.tensor not in masked:
            return f"{item.tensor} has no mask"
        if item.role in ON_WEIGHTS and item.tensor in dense:
            return f"{item.tensor} is dense"
    return ""


def _slices(atoms: Sequence[Atom]) -> tuple[SiteSlices, ...]:
    pairs: dict[tuple[str, int, str], list[tuple[int, int]]] = {}
    for number, atom in enumerate(atoms):
        carriers: dict[str, int] = {}
        for item in atom.of("carrier"):
            carriers[item.tensor] = carriers.get(item.tensor, 0) + 1
        for item in atom.slices:
            if item.role == "carrier" and carriers[item.tensor] > 1:
                continue  # a box inside the tensor, no slice; nothing reads what it makes
            own = pairs.setdefault((item.tensor, item.dim, item.role), [])
            own += [(position, number) for position in item.indices]
    return tuple(
        SiteSlices(tensor, dim, role, tuple(p for p, _ in sorted(own)), tuple(a for _, a in sorted(own)))
        for (tensor, dim, role), own in pairs.items()
    )
