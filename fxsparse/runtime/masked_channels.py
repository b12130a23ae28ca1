"""The runtime's view of one channel site: what `MaskedSite` is to a weight, with atoms in place of weights."""

import torch
from torch import Tensor

from ..core.channel_sites import ON_WEIGHTS, ChannelSite
from .channel_state import ChannelState
from .sites import DenseGradient, Site


class MaskedChannels(Site):
    """The atoms of a channel site as connections: a mask of one bool an atom, scores of one number an atom."""

    units = "channels"

    def __init__(self, state: ChannelState, site: ChannelSite, target: int, score: str) -> None:
        """`target` is the number of atoms that the allocation gives the site; `score` a choice of `channel_score`."""
        self.name = site.name
        self.size = site.size
        self.target = target
        self._state = state
        self._site = site
        self._score = score

    @property
    def device(self) -> torch.device:
        return self._state.mask(self._site.producers[0]).device

    @property
    def mask(self) -> Tensor:
        """Which atoms are active (bool)."""
        return self._state.alive[self.name].to(self.device)

    @property
    def active(self) -> int:
        """Number of active atoms."""
        return int(self._state.alive[self.name].sum())

    def magnitude(self) -> Tensor:
        """The mean magnitude of the active weights that make or read an atom; one number an atom."""
        state = self._state  # inactive channels may be open
        weights = {name: state.module.get_parameter(name).detach() * state.mask(name) for name in self._site.weights}
        return self._mean(weights, ON_WEIGHTS)

    def gradient(self) -> Tensor | None:
        """The mean magnitude of the dense gradient over the weights that read an atom; None where there was none.

        What makes an inactive channel has no gradient, since nothing reads it; so both kinds are compared by what
        all of them have.
        """
        gradients = {}
        for item in self._site.of("consumer"):
            gradient = self._state.module.get_parameter(item.tensor).grad
            if gradient is None:
                return None
            gradients[item.tensor] = gradient
        return self._mean(gradients, ("consumer",))

    def deferred_gradient(self, magnitude: bool) -> DenseGradient | None:
        """None: channels are not lowered."""
        return None

    def zero_gradient(self) -> Tensor:
        return torch.zeros(self.size, device=self.device)

    def score(self, values: Tensor) -> Tensor:
        """The magnitude of each atom's value; `gradient` has one an atom already."""
        return values.abs()

    def momentum(self, optimizer: torch.optim.Optimizer) -> Tensor:
        raise NotImplementedError("channels have no momentum; methods that read it are not for them")

    def sensitivity(self, gradient: Tensor) -> Tensor:
        raise NotImplementedError("channels have no sensitivity; methods that read it are not for them")

    def dead_units(self) -> tuple[int, int, int, int]:
        """Inactive atoms, and all; nothing is known of inputs."""
        return self.size - self.active, self.size, 0, 0

    def grown(self, mask: Tensor) -> Tensor:
        return mask & ~self.mask

    @torch.no_grad()
    def take_over(
        self,
        mask: Tensor,
        active: int,
        optimizer: torch.optim.Optimizer,
        kept: Tensor | None = None,
        optimizer_state: str = "masked",
    ) -> Tensor:
        """Replaces the pattern; see `Site.take_over`. The channels are open, and are closed by the caller."""
        state, after = self._state, mask.cpu()
        before = state.alive[self.name]
        restarted = torch.zeros_like(after) if kept is None else before & after & ~kept.cpu()
        state.note_new(self._site, after & ~before, restarted)
        state.set_alive(self._site, after)
        return mask & ~before.to(mask.device)

    def _mean(self, tensors: dict[str, Tensor], roles: tuple[str, ...]) -> Tensor:
        """Mean over each atom's active elements of `tensors`, of magnitudes, or the magnitude of the mean."""
        wide = torch.promote_types(next(iter(tensors.values())).dtype, torch.float32)
        total = torch.zeros(self.size, dtype=wide, device=self.device)
        count = torch.zeros(self.size, dtype=wide, device=self.device)
        for item in self._site.of(*roles):
            tensor = tensors[item.tensor]
            others = [dim for dim in range(tensor.ndim) if dim != item.dim]
            values = tensor.to(wide).abs() if self._score == "mean_of_magnitudes" else tensor.to(wide)
            elements = tensor.numel() // tensor.shape[item.dim]
            for dim, alive in self._state.along(item.tensor).items():
                if dim != item.dim:
                    elements = elements // len(alive) * int(alive.sum())
            atoms = torch.tensor(item.atoms, device=self.device)
            positions = torch.tensor(item.positions, device=self.device)
            total.index_add_(0, atoms, values.sum(others)[positions])
            count.index_add_(0, atoms, torch.full_like(atoms, elements, dtype=wide))
        return (total / count.clamp(min=1)).abs()
