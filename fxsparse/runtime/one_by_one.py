"""Rewiring with one dense gradient at a time: it is formed, its largest entries are chosen, the rest is thrown away."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .methods import Method, Moment, Pattern
from .sites import DenseGradient, Site


@dataclass
class Chosen:
    """What was chosen of the sites that had a gradient.

    Attributes:
        sites, patterns: a pattern a site.
        norms: of each the 2-norm of its gradient over what is grown.
        lacking: sites without a gradient.
        finite: whether all gradients were.
    """

    sites: list[Site]
    patterns: list[Pattern]
    norms: list[Tensor]
    lacking: list[Site]
    finite: bool = True


def choose_one_by_one(
    method: Method,
    pairs: Sequence[tuple[Site, Tensor | DenseGradient | None]],
    moment: Moment,
    scale: Tensor | None,
) -> Chosen:
    """The new patterns of a method that looks at each site by itself; nothing is changed.

    Args:
        pairs: sites, with their dense gradients or what forms them.
        scale: of the loss, which a fused optimizer under GradScaler divides by itself.
    """
    chosen = Chosen([], [], [], [])
    for site, given in pairs:
        if given is None:
            chosen.lacking.append(site)
            continue
        gradient = given if isinstance(given, Tensor) else given()
        gradient = gradient if scale is None or isinstance(given, Tensor) else gradient / scale
        if not torch.isfinite(gradient).all():
            chosen.finite = False
            return chosen
        pattern = method.new_patterns([site], [gradient], moment)[0]
        chosen.sites.append(site)
        chosen.patterns.append(pattern)
        chosen.norms.append((gradient.float() * site.grown(pattern.mask)).norm())
    return chosen
