"""What a rewiring takes over: from the gradients that are there to a new pattern for each site. Nothing is changed.

Dense gradients that are there are looked at together. Those that have to be formed are formed one at a time: the
largest entries are chosen, the rest is thrown away.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .methods import Method, Moment, Pattern
from .sites import DenseGradient, Site

Gradient = Tensor | DenseGradient | None
"""Of a site: there, to be formed, or none."""


@dataclass
class Chosen:
    """The choice.

    Attributes:
        sites, patterns: those that take over a pattern.
        gradients: of each its gradient, or the 2-norm of it over what is grown; None where the method reads none.
        lacking: sites that have no gradient.
        finite: whether all gradients were; nothing was chosen otherwise.
    """

    sites: list[Site] = field(default_factory=list)
    patterns: list[Pattern] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    lacking: list[Site] = field(default_factory=list)
    finite: bool = True


def choose_patterns(
    method: Method, pairs: Sequence[tuple[Site, Gradient]], moment: Moment, scale: Tensor | None
) -> Chosen | None:
    """The new patterns of the sites that can be rewired; None where the method leaves all for now.

    Args:
        pairs: sites, with their gradients or what forms them.
        scale: of the loss, which a fused optimizer under GradScaler divides by itself; of formed gradients.
    """
    if any(callable(gradient) for _, gradient in pairs):
        return _one_by_one(method, pairs, moment, scale)
    needed = method.reads_gradient
    given = [(site, gradient) for site, gradient in pairs if not callable(gradient)]
    present = [gradient for _, gradient in given if gradient is not None]
    if present and not _all_finite(present, given[0][0]):
        return Chosen(finite=False)
    if present and method.one_shot:  # there is no later rewiring: what has no gradient has no influence
        given = [(site, site.zero_gradient() if gradient is None else gradient) for site, gradient in given]
    ready = [(site, gradient) for site, gradient in given if gradient is not None or not needed]
    lacking = [site for site, gradient in given if gradient is None and needed]
    sites, gradients = [site for site, _ in ready], [gradient for _, gradient in ready]
    if not sites:
        return Chosen(lacking=lacking)
    patterns = method.new_patterns(sites, gradients, moment)
    return Chosen(sites, patterns, gradients, lacking) if patterns else None


def _one_by_one(method: Method, pairs: Sequence[tuple[Site, Gradient]], moment: Moment, scale: Tensor | None) -> Chosen:
    """For a method that looks at each site by itself."""
    chosen = Chosen()
    for site, given in pairs:
        if given is None:
            chosen.lacking.append(site)
            continue
        gradient = given if isinstance(given, Tensor) else given()
        gradient = gradient if scale is None or isinstance(given, Tensor) else gradient / scale
        if not _all_finite([gradient], site):
            return Chosen(finite=False)
        pattern = method.new_patterns([site], [gradient], moment)[0]
        chosen.sites.append(site)
        chosen.patterns.append(pattern)
        chosen.gradients.append((gradient.float() * site.grown(pattern.mask)).norm())
    return chosen


def _all_finite(tensors: list[Tensor], site: Site) -> bool:
    """One answer for all tensors, on all ranks that share the site, with one host synchronisation."""
    return bool(site.shards.everywhere(torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all()))
