"""Weights that an optimizer moved although they are inactive: looked for now and then, and set back from then on."""

from collections.abc import Callable, Sequence

import torch

from .sites import StoredSite


class Strays:
    """Keeps inactive weights at 0.

    Attributes:
        remask: whether that takes a pass after every step, for an optimizer that was seen to move them.
    """

    def __init__(self, sites: Sequence[StoredSite], remask: bool, optimizer: str, warn: Callable[[str], None]) -> None:
        """`sites` may change; `optimizer` is its name for the message."""
        self.remask = remask
        self._sites = sites
        self._optimizer = optimizer
        self._warn = warn
        self._due = False

    def set_back(self) -> None:
        """Called after the optimizer's step."""
        if self.remask:
            for site in self._sites:
                site.apply_mask_()

    def look(self, step_count: int, may_wait: bool) -> None:
        """Called after that, with the number of steps made.

        At steps 1, 2, 4, 8, ..., since a warm-up may hide it at first. A look costs a host synchronisation; one that is
        due on an update step, which is not to wait, comes at the next step.
        """
        self._due |= step_count.bit_count() == 1
        if not self._due or self.remask or not may_wait:
            return
        self._due = False
        name = stray_site(self._sites)
        if name is not None:
            self.remask = True
            self._warn(f"{self._optimizer} moved inactive weights ({name}); they are set back to 0 after every step")
            self.set_back()


def stray_site(sites: Sequence[StoredSite]) -> str | None:
    """The first of some sites with a weight that is not 0 where it is inactive; one host synchronisation for all."""
    stray = torch.stack([site.stray_weights() for site in sites]).tolist()
    return next((site.name for site, count in zip(sites, stray, strict=True) if count), None)
