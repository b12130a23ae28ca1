"""Which channels are active, and the weights, masks and optimizer state that go with it.

A channel that is not active has zeros in everything that makes it (weights, biases, norms) and in all weights that
read it, so nothing of it can reach the output, and it can be cut out. But nothing can reach it either: with zeros
on both sides every gradient is exactly 0, at any time. So a channel is grown with what makes it drawn afresh
and what reads it at 0: the outputs do not change, and the next step has a gradient for the weights that read it.
The gradients that growth is decided by are taken in the same circumstances: for the update step all inactive
channels are *open*, which means that they hold those fresh values, and the graph reads weights as they are stored.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..core.channel_sites import FRESH_STATISTICS, ON_WEIGHTS, ChannelSite, alive_along, alive_in, structured_mask
from ..core.masking import seeded_generator
from .compaction import Compaction
from .masked_site import MaskedModule


class ChannelState:
    """The active channels of a module in a run. They are known from the masks of its weights alone.

    Attributes:
        module: whose tensors are meant.
        sites: its channel sites.
        is_open: whether inactive channels hold fresh values now.
        step: the update step that they were drawn for.
    """

    def __init__(
        self,
        module: MaskedModule,
        optimizer: torch.optim.Optimizer,
        sites: Sequence[ChannelSite],
        seed: int,
        compaction: Compaction | None = None,
    ) -> None:
        """With a `compaction`, the module can be made small and large again."""
        self.module = module
        self.sites = tuple(sites)
        self.is_open = False
        self.step = 0
        self._optimizer = optimizer
        self._seed = seed
        self._compaction = compaction
        self._weights = {site.name: site for site in module.sites}
        self._new: list[tuple[ChannelSite, Tensor, Tensor]] = []
        self._alive: dict[str, Tensor] = {}
        self._versions: tuple = ()

    def mask(self, weight: str) -> Tensor:
        return self.module.get_buffer(self._weights[weight].mask_name)

    @property
    def alive(self) -> dict[str, Tensor]:
        """Channel site -> which of its atoms are active (bool, CPU); read anew after somebody else changed a mask."""
        if self.is_small:
            return self._alive
        masks = {name: self.mask(name) for name in self._weights}
        versions = tuple((id(mask), mask._version) for mask in masks.values())
        if versions != self._versions:
            self._alive = {site.name: alive_in(site, masks) for site in self.sites}
            self._versions = versions
        return self._alive

    def along(self, weight: str) -> dict[int, Tensor]:
        """Dimension of a weight -> which of its indices belong to active channels (bool, CPU)."""
        return alive_along(self.sites, self.alive, weight, self._weights[weight].shape)

    @torch.no_grad()
    def set_alive(self, site: ChannelSite, alive: Tensor) -> None:
        """Takes note of a site's active atoms; the masks of its weights follow, in place."""
        known = self.alive | {site.name: alive.cpu()}
        for weight in site.weights:
            along = alive_along(self.sites, known, weight, self._weights[weight].shape)
            mask = self.mask(weight)
            mask.copy_(structured_mask({dim: own.to(mask.device) for dim, own in along.items()}, mask.shape))
        self._alive = known
        self._versions = tuple((id(mask), mask._version) for mask in map(self.mask, self._weights))

    # -- size ---------------------------------------------------------------------------------------------

    @property
    def is_small(self) -> bool:
        """Whether inactive channels are cut out of the module now."""
        return self._compaction is not None and self._compaction.is_small

    def compact_size(self) -> None:
        """Cuts inactive channels out of the module, if that is what this run does."""
        if self._compaction is not None and not self._compaction.is_small:
            self.close()
            self._compaction.shrink(self.alive)

    def full_size(self) -> None:
        """Gives the module its own size back."""
        if self._compaction is not None:
            self._compaction.expand()

    @contextmanager
    def at_full_size(self) -> Iterator[None]:
        """At the full size and closed for a while."""
        small, was_open = self.is_small, self.is_open
        gradients = {p: p.grad for p in self.module.parameters() if p.grad is not None} if small else {}
        self.full_size()
        self.close()
        try:
            yield
        finally:
            if small:
                self.compact_size()
                for parameter, gradient in gradients.items():
                    if parameter.shape == gradient.shape:
                        parameter.grad = gradient
            elif was_open:
                self.open(self.step)

    # -- values -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def clear(self, site: ChannelSite, atoms: Tensor, roles: Sequence[str] = (*ON_WEIGHTS, "carrier")) -> None:
        """Sets these atoms' slices of parameters, and of the optimizer's buffers of their shapes, to 0.

        Args:
            atoms: bool, one an atom (CPU).
            roles: only slices with these.
        """
        for item in site.of(*roles):
            parameter = self._parameter(item.tensor)
            if parameter is None:
                continue
            index = item.positions_of(atoms).to(parameter.device)
            parameter.index_fill_(item.dim, index, 0)
            self._clear_state(parameter, item.dim, index)

    @torch.no_grad()
    def freshen(self, site: ChannelSite, atoms: Tensor) -> None:
        """Gives these atoms what a new channel starts with; zeros in what reads them, and in the optimizer's state.

        The weights that make them are normal with the standard deviation (about 0) of the weight's active elements;
        biases, norms and the like have the mean of the active channels; batch statistics are 0 and 1.
        """
        self.clear(site, atoms)
        for item in site.of("producer", "copy"):
            weight = self.module.get_parameter(item.tensor)
            index = item.positions_of(atoms)
            if not len(index):
                continue
            mask = self.mask(item.tensor)
            squares = (weight.float() * mask).square().sum()  # a half would overflow
            deviation = (squares / mask.sum().clamp(min=1)).sqrt()
            inputs = max(weight[0].numel(), 1)
            deviation = torch.where(deviation > 0, deviation, inputs**-0.5)  # of a weight with nothing active
            shape = [len(item.positions) if dim == item.dim else n for dim, n in enumerate(weight.shape)]
            generator = seeded_generator(self._seed, "fresh", self.step, item.tensor, item.dim)
            values = torch.randn(shape, generator=generator)[_at(item.dim, atoms[list(item.atoms)])]
            others = {dim: own for dim, own in self.along(item.tensor).items() if dim != item.dim}
            values *= structured_mask(others, values.shape)
            weight.index_copy_(
                item.dim, index.to(weight.device), (values.to(weight.device) * deviation).to(weight.dtype)
            )
        alive = self.alive[site.name]
        for item in site.of("carrier"):
            parameter = self._parameter(item.tensor)
            index = item.positions_of(atoms)
            if parameter is None:
                last = item.tensor.rpartition(".")[2]
                if last in FRESH_STATISTICS:
                    buffer = self.module.get_buffer(item.tensor)
                    buffer.index_fill_(item.dim, index.to(buffer.device), FRESH_STATISTICS[last])
            else:
                active = item.positions_of(alive).to(parameter.device)
                if len(active):
                    mean = parameter.index_select(item.dim, active).mean(item.dim, keepdim=True)
                else:
                    first = parameter.narrow(item.dim, 0, 1)
                    mean = torch.full_like(first, 1.0 if item.tensor.endswith("weight") else 0.0)
                shape = [len(index) if dim == item.dim else n for dim, n in enumerate(parameter.shape)]
                parameter.index_copy_(item.dim, index.to(parameter.device), mean.expand(shape).contiguous())

    def open(self, step: int) -> None:
        """Gives every inactive channel fresh values, the same at every call for the update step `step`."""
        if not self.is_open:
            self.step = step
            for site in self.sites:
                self.freshen(site, ~self.alive[site.name])
            self.is_open = True

    def note_new(self, site: ChannelSite, grown: Tensor, restarted: Tensor) -> None:
        """Has nothing read these active atoms when the channels are closed; the restarted ones are drawn anew."""
        self._new.append((site, grown | restarted, restarted))

    def close(self) -> None:
        """Takes fresh values away again: inactive channels are 0."""
        if self.is_open:
            for site, _, restarted in self._new:
                self.freshen(site, restarted)
            for site, new, _ in self._new:
                self.clear(site, new, ("consumer",))
            self._new.clear()
            for site in self.sites:
                self.clear(site, ~self.alive[site.name])
            self.is_open = False

    def _parameter(self, name: str) -> nn.Parameter | None:
        owner, _, last = name.rpartition(".")
        return self.module.get_submodule(owner)._parameters.get(last)

    def _clear_state(self, parameter: nn.Parameter, dim: int, index: Tensor) -> None:
        for state in self._optimizer.state.get(parameter, {}).values():
            if isinstance(state, Tensor) and state.shape == parameter.shape:
                state.index_fill_(dim, index, 0)


def _at(dim: int, chosen: Tensor) -> tuple:
    return (*[slice(None)] * dim, chosen)
