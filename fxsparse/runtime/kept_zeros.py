"""Carries over optimizer steps what is known of zeros in storage, so that the forward pass need not multiply.

A step keeps the zeros of inactive weights if they were there, have no gradient and no momentum, and the optimizer
treats every element by itself. What a user's own code writes into gradients nobody can know: the rewirer looks now and
then.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, optim

from .masked_site import MaskedSite

ELEMENTWISE = (
    *(optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax),
    *(optim.RMSprop, optim.Adagrad, optim.Adadelta),
)
"""Optimizers that leave a weight of 0 at 0 whose gradient and state are 0: these classes, not those made from them."""

LOOK_EVERY = 128  # steps; more often at the beginning


class KeptZeros:
    """What is known of the zeros of some sites, from step to step."""

    def __init__(self, sites: Sequence[MaskedSite], optimizer: optim.Optimizer) -> None:
        """Looks once at each site and at the optimizer's state of it (a host synchronisation)."""
        self._sites = sites  # as it is at the time: sites are replaced when their storage changes
        self._optimizer = optimizer
        self._elementwise = type(optimizer) in ELEMENTWISE
        self._held: list[MaskedSite] = []
        self.state_loaded()
        self.handle = optimizer.register_load_state_dict_post_hook(lambda _: self.state_loaded())
        if self.stray_weight() is None:
            self.found()

    def state_loaded(self) -> None:
        """The optimizer may have momentum where weights are inactive."""
        self._state_known = False

    def before_step(self) -> None:
        """The optimizer, or a rewiring, is about to write."""
        if not self._state_known:
            self._state_is_masked = self._elementwise and not _any_stray(self._sites, self._optimizer)
            self._state_known = True
        self._held = [site for site in self._sites if site.has_zeros()] if self._state_is_masked else []

    def after_step(self) -> None:
        """They have written."""
        for site in self._held:
            site.note_zeros()

    def found(self) -> None:
        """All inactive weights have been seen to be 0, or were made so."""
        for site in self._sites:
            site.note_zeros()

    def stray_weight(self) -> str | None:
        """The first site with a weight that is not 0 where it is inactive; one host synchronisation for all."""
        stray = torch.stack([site.stray_weights() for site in self._sites]).tolist()
        return next((site.name for site, count in zip(self._sites, stray, strict=True) if count), None)

    @staticmethod
    def is_time_to_look(step_count: int) -> bool:
        """At steps 1, 2, 4, 8, ..., since a warm-up may hide it at first, and from there on every so often."""
        return step_count.bit_count() == 1 or step_count % LOOK_EVERY == 0


def _any_stray(sites: Sequence[MaskedSite], optimizer: optim.Optimizer) -> bool:
    """Whether the optimizer's state is other than 0 where a weight is inactive."""
    stray: list[Tensor] = [count for site in sites for count in site.stray_state(optimizer)]
    return bool(stray) and bool(torch.stack(stray).any())
