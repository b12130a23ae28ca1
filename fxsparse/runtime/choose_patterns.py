"""What a rewiring takes over: from the gradients that are there to a new pattern for each site. Nothing is changed.

Whether all gradients are finite is known at once on the host. On a device it is a tensor that nobody reads: there the
patterns are chosen in any case, and one that comes of a gradient that was not finite is the old one.

Dense gradients that are there are looked at together. Those that have to be formed are formed one at a time: the
largest entries are chosen, the rest is thrown away.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.host import on_host
from ..core.zeroing import norm_within
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
        finite: whether all gradients were: nothing was chosen otherwise; or a bool tensor (0-dim, on the device) by
            which the patterns are new or those that the sites have.
    """

    sites: list[Site] = field(default_factory=list)
    patterns: list[Pattern] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    lacking: list[Site] = field(default_factory=list)
    finite: bool | Tensor = True


def choose_patterns(
    method: Method, pairs: Sequence[tuple[Site, Gradient]], moment: Moment, scale: Tensor | None, wait: bool = False
) -> Chosen | None:
    """The new patterns of the sites that can be rewired; None where the method leaves all for now.

    Args:
        pairs: sites, with their gradients or what forms them.
        scale: of the loss, which a fused optimizer under GradScaler divides by itself; of formed gradients.
        wait: whether to wait for the device and know at once that gradients are finite, as methods need whose numbers
            of connections depend on data, and which wait for it anyway.
    """
    if any(callable(gradient) for _, gradient in pairs):
        return _one_by_one(method, pairs, moment, scale)
    needed = method.reads_gradient
    given = [(site, gradient) for site, gradient in pairs if not callable(gradient)]
    present = [gradient for _, gradient in given if gradient is not None]
    finite = _all_finite(present, given[0][0]) if present else True
    if wait or method.one_shot or method.moves_connections:
        finite = bool(finite)
    if finite is False:
        return Chosen(finite=False)
    if present and method.one_shot:  # there is no later rewiring: what has no gradient has no influence
        given = [(site, site.zero_gradient() if gradient is None else gradient) for site, gradient in given]
    ready = [(site, gradient) for site, gradient in given if gradient is not None or not needed]
    lacking = [site for site, gradient in given if gradient is None and needed]
    sites, gradients = [site for site, _ in ready], [gradient for _, gradient in ready]
    if not sites:
        return Chosen(lacking=lacking)
    patterns = method.new_patterns(sites, gradients, moment)
    if any(pattern.active != site.active for pattern, site in zip(patterns, sites, strict=False)):
        finite = bool(finite)  # the host has to know how many are active
        if not finite:
            return Chosen(finite=False)
    if isinstance(finite, Tensor):
        patterns = [_if(finite, pattern, site) for pattern, site in zip(patterns, sites, strict=True)]
    return Chosen(sites, patterns, gradients, lacking, finite) if patterns else None


def _one_by_one(method: Method, pairs: Sequence[tuple[Site, Gradient]], moment: Moment, scale: Tensor | None) -> Chosen:
    """For a method that looks at each site by itself."""
    chosen = Chosen()
    for site, given in pairs:
        if given is None:
            chosen.lacking.append(site)
            continue
        gradient = given if isinstance(given, Tensor) else given()
        gradient = gradient if scale is None or isinstance(given, Tensor) else gradient / scale
        if not _all_finite([gradient], site):  # waits: gradients are formed on the CPU
            return Chosen(finite=False)
        pattern = method.new_patterns([site], [gradient], moment)[0]
        chosen.sites.append(site)
        chosen.patterns.append(pattern)
        chosen.gradients.append(norm_within(gradient, site.grown(pattern.mask)))
    return chosen


def _if(finite: Tensor, pattern: Pattern, site: Site) -> Pattern:
    """The pattern, or the one that the site has, with all of it kept."""
    return Pattern(torch.where(finite, pattern.mask, site.mask), pattern.active, pattern.kept | ~finite)


def _all_finite(tensors: list[Tensor], site: Site) -> bool | Tensor:
    """One answer for all tensors, on all ranks that share the site: known, or 0-dim where reading it would wait."""
    if all(on_host(tensor) for tensor in tensors):
        finite: bool | Tensor = all(_is_finite(tensor) for tensor in tensors)
    else:
        # Of a tensor without elements, the part of a rank that holds no rows, there is no greatest.
        some = [tensors[0].new_zeros(1), *(tensor for tensor in tensors if tensor.numel())]
        greatest = torch._foreach_norm(some, float("inf"))  # NaN where one is; all tensors in a few launches
        finite = torch.isfinite(torch.stack(list(greatest))).all()
    return site.shards.everywhere(finite)


def _is_finite(tensor: Tensor) -> bool:
    """A sum takes a tenth of the time and is finite only if all elements are; one that is not may have overflowed."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return math.isfinite(tensor.sum(dtype=wide)) or bool(torch.isfinite(tensor).all())
