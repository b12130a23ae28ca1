"""Inactive weights are 0 in storage: what keeps them so from step to step, and what is known of it.

A step keeps the zeros if they were there, have no gradient and no momentum, and the optimizer treats every element by
itself; the forward pass then need not multiply by masks (`core.known_zeros`). What other optimizers do, and what is
written in ways that nobody sees, is looked for now and then; weights that moved are set back from then on.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, optim

from ..core.host import on_host
from .masked_site import MaskedSite

ELEMENTWISE = (
    *(optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax),
    *(optim.RMSprop, optim.Adagrad, optim.Adadelta),
)
"""Optimizers that leave a weight of 0 at 0 whose gradient and state are 0: these classes, not those made from them."""

LOOK_EVERY = 128  # steps; more often at the beginning


class KeptZeros:
    """Keeps inactive weights at 0.

    Attributes:
        remask: whether that takes a pass after every step, for an optimizer that is to move them, or was seen to.
    """

    def __init__(
        self,
        sites: Sequence[MaskedSite],
        optimizer: optim.Optimizer,
        remask: bool,
        warn: Callable[[str], None],
        sharded: bool = False,
    ) -> None:
        """Sets inactive weights to 0. `sites` may change: their storage does.

        Of a `sharded` module every forward pass sees what is stored, so that no step goes without a pass.
        """
        self.remask = remask
        self._sharded = sharded
        self._sites = sites
        self._optimizer = optimizer
        self._warn = warn
        self._elementwise = type(optimizer) in ELEMENTWISE
        self._due = False
        self._state_is_masked = False
        self._held: list[MaskedSite] = []
        self.state_loaded()
        self.handle = optimizer.register_load_state_dict_post_hook(lambda _: self.state_loaded())
        self.forget()
        for site in [] if sharded else self._sites:
            site.apply_mask_()

    def forget(self) -> None:
        """Nothing is known of the weights until the next look, which comes at once where it is free."""
        for site in self._sites:
            site.forget_zeros()
        self._due |= all(on_host(site.parameter) for site in self._sites)

    def state_loaded(self) -> None:
        """The optimizer may have momentum where weights are inactive."""
        self._state_known = False

    def before_step(self) -> None:
        """The optimizer, or a rewiring, is about to write. After its state was loaded, waits for the device once."""
        if not self._state_known and not self._sharded:
            self._state_is_masked = self._elementwise and not _any_stray(self._sites, self._optimizer)
            self._state_known = True
        self._held = [site for site in self._sites if site.has_zeros()] if self._state_is_masked else []
        if not self._state_is_masked:  # fused kernels and writes through `.data` do not show in version counters
            for site in self._sites:
                site.forget_zeros()

    def mask_gradients(self) -> None:
        """Called before an ordinary step: the optimizer will keep the zeros.

        Gradients come masked from the backward pass; this is for those that somebody has written to since (clipping,
        accumulation, a penalty of the user's own), where one pass over them is cheaper than any look.
        """
        for site in self._held:
            if not site.has_masked_gradient():
                site.mask_gradient_()

    def set_back(self) -> None:
        """The optimizer has written."""
        if self.remask or self._sharded:
            for site in self._sites:
                site.apply_mask_()

    def after_step(self) -> None:
        """A rewiring has written too."""
        for site in self._held:
            site.note_zeros()

    def look(self, step_count: int, may_wait: bool) -> None:
        """Called after that, with the number of steps made.

        At steps 1, 2, 4, 8, ..., since a warm-up may hide it at first, and from there on every so often. A look costs a
        host synchronisation; one that is due on an update step, which is not to wait, comes at the next step.
        """
        self._due |= step_count.bit_count() == 1 or step_count % LOOK_EVERY == 0
        if not self._due or self.remask or self._sharded or not may_wait:
            return
        self._due = False
        name = self.stray_weight()
        if name is None:
            self._found()
            return
        self.remask = True
        sees_all = self._elementwise and self._state_is_masked
        who = "a write outside of the optimizer (through .data?)" if sees_all else type(self._optimizer).__name__
        self._warn(f"{who} moved inactive weights ({name}); they are set back to 0 after every step")
        self.set_back()

    def _found(self) -> None:
        for site in self._sites:
            site.note_zeros()

    def stray_weight(self) -> str | None:
        """The first site with a weight that is not 0 where it is inactive; one host synchronisation for all."""
        stray = torch.stack([site.stray_weights() for site in self._sites]).tolist()
        return next((site.name for site, count in zip(self._sites, stray, strict=True) if count), None)


def _any_stray(sites: Sequence[MaskedSite], optimizer: optim.Optimizer) -> bool:
    """Whether the optimizer's state is other than 0 where a weight is inactive."""
    stray: list[Tensor] = [count for site in sites for count in site.stray_state(optimizer)]
    return bool(stray) and bool(torch.stack(stray).any())
