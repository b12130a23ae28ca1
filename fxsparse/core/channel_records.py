"""What the analysis of channels finds: plain records, keyed by qualified names of parameters and buffers."""

from dataclasses import dataclass
from typing import Literal, get_args

from .errors import ConfigError

Status = Literal["exact", "norm-coupled", "pinned"]


@dataclass(frozen=True)
class ChannelSlice:
    """Slices of one tensor that belong to an atom.

    Attributes:
        tensor: qualified name of a parameter or buffer.
        dim: the dimension that is cut.
        indices: along that dimension.
        role: `"producer"` (the weight makes these channels), `"consumer"` (it reads them), `"copy"` (a depthwise
            weight, which does both), `"carrier"` (bias, normalisation, a parameter that is added or multiplied).
    """

    tensor: str
    dim: int
    indices: tuple[int, ...]
    role: str


@dataclass(frozen=True)
class Atom:
    """Channels that can only be removed together, with everything that goes with them.

    Attributes:
        id: a number, the same at every analysis of the same model.
        status: `"exact"`: when the consumers' slices are masked, removing the atom changes nothing else.
            `"norm-coupled"`: a normalisation or reduction mixes it with others, which would get other values.
            `"pinned"`: it has to stay.
        reason: the node that couples or pins it; empty for an exact one.
        slices: the producers' first.
    """

    id: int
    status: Status
    reason: str
    slices: tuple[ChannelSlice, ...]

    def of(self, role: str) -> tuple[ChannelSlice, ...]:
        """The slices with this role."""
        return tuple(item for item in self.slices if item.role == role)


@dataclass(frozen=True)
class ChannelGroup:
    """Atoms with the same producers.

    Attributes:
        producers: names of the weights that make the channels, in execution order.
        atoms: in the order of their channels.
    """

    producers: tuple[str, ...]
    atoms: tuple[Atom, ...]

    @property
    def name(self) -> str:
        """The first producer's name."""
        return self.producers[0]

    def with_status(self, status: Status) -> tuple[Atom, ...]:
        """The atoms of a kind: `"exact"`, `"norm-coupled"` or `"pinned"`."""
        if status not in get_args(Status):
            raise ConfigError(f"status: {status!r} is not one of {', '.join(get_args(Status))}")
        return tuple(atom for atom in self.atoms if atom.status == status)

    @property
    def status(self) -> Status:
        """The best status among the atoms."""
        found = {atom.status for atom in self.atoms}
        return "exact" if "exact" in found else "norm-coupled" if "norm-coupled" in found else "pinned"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why atoms are coupled or pinned, each once."""
        return tuple(dict.fromkeys(atom.reason for atom in self.atoms if atom.reason))
