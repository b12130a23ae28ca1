"""`ChannelSite`: what is dropped and grown at the granularity of channels, and the masks that follow from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ON_WEIGHTS = ("producer", "copy", "consumer")
"""Roles of slices of weights; slices of biases, norms and added parameters are carriers."""

FRESH_STATISTICS = {"running_mean": 0.0, "running_var": 1.0}
"""Buffers of batch normalisation, and what they are for a new channel."""


@dataclass(frozen=True)
class SiteSlices:
    """The slices of one tensor, along one dimension, that belong to the atoms of a channel site.

    Attributes:
        tensor: qualified name of a parameter or buffer.
        dim: the dimension that is cut.
        role: `"producer"`, `"copy"`, `"consumer"` or `"carrier"`, as of `ChannelSlice`.
        positions: indices along that dimension.
        atoms: for each of them the atom that it belongs to, counted within the site.
    """

    tensor: str
    dim: int
    role: str
    positions: tuple[int, ...]
    atoms: tuple[int, ...]

    def positions_of(self, atoms: Tensor) -> Tensor:
        """The indices along the dimension that belong to these atoms (bool, one an atom; CPU)."""
        return torch.tensor(self.positions)[atoms[list(self.atoms)]]

    def spread(self, values: Tensor, onto: Tensor) -> None:
        """Writes each atom's value at its positions of a vector along the dimension."""
        onto[list(self.positions)] = values[list(self.atoms)]


@dataclass(frozen=True)
class ChannelSite:
    """The channels of a group that training may drop, each by itself.

    Attributes:
        name: `"channels of <first producer>"`.
        producers: names of the weights that make the channels, in execution order.
        size: number of atoms.
        slices: of every tensor that the atoms touch.
    """

    name: str
    producers: tuple[str, ...]
    size: int
    slices: tuple[SiteSlices, ...]

    def of(self, *roles: str) -> tuple[SiteSlices, ...]:
        """The slices with these roles."""
        return tuple(item for item in self.slices if item.role in roles)

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weights that the atoms touch."""
        return tuple(dict.fromkeys(item.tensor for item in self.of(*ON_WEIGHTS)))


Alive = Mapping[str, Tensor]
"""Name of a channel site -> which of its atoms are active (bool, on the CPU)."""


def alive_along(sites: Sequence[ChannelSite], alive: Alive, weight: str, shape: Sequence[int]) -> dict[int, Tensor]:
    """Dimension of a weight -> which of its indices belong to active channels (bool, CPU); others are whole."""
    along: dict[int, Tensor] = {}
    for site in sites:
        for item in site.of(*ON_WEIGHTS):
            if item.tensor == weight:
                own = along.setdefault(item.dim, torch.ones(shape[item.dim], dtype=torch.bool))
                item.spread(alive[site.name], own)
    return along


def structured_mask(along: Mapping[int, Tensor], shape: Sequence[int]) -> Tensor:
    """The mask of a weight of `shape` whose element is active if it is along every dimension (bool)."""
    device = next((vector.device for vector in along.values()), torch.device("cpu"))
    mask = torch.ones(tuple(shape), dtype=torch.bool, device=device)
    for dim, vector in along.items():
        mask &= vector.view([-1 if axis == dim else 1 for axis in range(len(shape))])
    return mask


def alive_in(site: ChannelSite, masks: Mapping[str, Tensor]) -> Tensor:
    """Which atoms of a site the masks of its weights leave something of (bool, CPU)."""
    alive = torch.zeros(site.size, dtype=torch.bool)
    for item in site.of("producer", "copy"):
        mask = masks[item.tensor]
        others = [dim for dim in range(mask.ndim) if dim != item.dim]
        along = mask.amax(others).cpu()
        alive[list(item.atoms)] |= along[list(item.positions)]
    return alive


@dataclass(frozen=True)
class ChannelPlan:
    """What a model that is sparse in channels has beside its weight sites.

    Attributes:
        sites: the channel sites, in execution order.
        targets: channel site -> number of atoms that the allocation gives it.
        stays: first producer of a group -> why channels of it have to stay.
        outside: names of the weights that are in no budget: those that make the model's outputs.
    """

    sites: tuple[ChannelSite, ...]
    targets: Mapping[str, int]
    stays: Mapping[str, str]
    outside: frozenset[str]


@torch.no_grad()
def clear_carriers(module: nn.Module, site: ChannelSite, atoms: Tensor) -> None:
    """Sets the biases, norms and the like of these atoms (bool, CPU) to 0."""
    for item in site.of("carrier"):
        owner, _, last = item.tensor.rpartition(".")
        parameter = module.get_submodule(owner)._parameters.get(last)
        if parameter is not None:
            parameter.index_fill_(item.dim, item.positions_of(atoms).to(parameter.device), 0)
