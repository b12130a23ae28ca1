"""Decides which sites get a mask, and which of those stay dense."""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

from fxsparse.core.errors import SelectionError, nearest
from fxsparse.core.records import Captured, Uncovered, WeightSite

Selector: TypeAlias = str | type[nn.Module]
Selectors: TypeAlias = Collection[Selector] | Selector
SELECTORS = ("first", "last", "depthwise")


def select_sites(
    captured: Captured,
    sites: Sequence[WeightSite],
    uncovered: Sequence[Uncovered],
    *,
    include: Selectors | None = None,
    exclude: Selectors = (),
    dense: Selectors = (),
) -> tuple[list[WeightSite], list[str], list[Uncovered]]:
    """The sites that are masked, the names among them that stay at density 1, and all that have no mask.

    Args:
        include: only these get masks (default: all but those tied to an embedding, frozen ones, and tables of
            positions or tokens that are multiplied with the input).
        exclude: these get no mask and are in no budget.
        dense: these get masks of ones and stay in the budget.
            Each takes globs of weight names, names of modules, `nn.Module` types (of the module that holds
            the weight), and the selectors `"first"`, `"last"` (in execution order) and `"depthwise"`.

    Raises:
        SelectionError: a selector that matches nothing, a weight that cannot be masked, or no site left.
    """
    if not sites:
        listed = "; ".join(f"{item.name}: {item.reason}" for item in uncovered) or "it has no matrix-shaped parameter"
        raise SelectionError(f"{type(captured.model).__name__} has no weight to mask ({listed})")

    def expand(argument: str, selectors: Selectors) -> set[str]:
        chosen: set[str] = set()
        is_one = isinstance(selectors, (str, type)) or not isinstance(selectors, Collection)
        for selector in [selectors] if is_one else selectors:
            chosen |= _matches(argument, selector, sites, uncovered)
        return chosen

    reasons: dict[str, str] = {}
    if include is None:
        for site in sites:
            if site.tied_embedding:
                reasons[site.name] = "tied to an embedding; name it in include to mask both uses"
            elif site.looks_like_a_table:
                reasons[site.name] = "positions or tokens, by its name; name it in include to mask it"
            elif site.frozen:
                reasons[site.name] = "frozen: it does not require a gradient"
    else:
        wanted = expand("include", include)
        reasons = {site.name: "not in include" for site in sites if site.name not in wanted}
    reasons |= dict.fromkeys(expand("exclude", exclude), "excluded")
    chosen = [site for site in sites if site.name not in reasons]
    if not chosen:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
        raise SelectionError(f"include and exclude leave none of the {len(sites)} weight sites ({listed})")
    stay_dense = expand("dense", dense)
    for name in stay_dense & reasons.keys():
        raise SelectionError(f"dense: {name} has no mask ({reasons[name]}), so it cannot be in the budget")
    left_out = [Uncovered(site.name, site.shape, reasons[site.name]) for site in sites if site.name in reasons]
    return chosen, [site.name for site in chosen if site.name in stay_dense], [*left_out, *uncovered]


def _matches(argument: str, selector: Any, sites: Sequence[WeightSite], uncovered: Sequence[Uncovered]) -> set[str]:
    if isinstance(selector, type) and issubclass(selector, nn.Module):
        found = {site.name for site in sites if issubclass(site.owner, selector)}
    elif not isinstance(selector, str):
        raise SelectionError(f"{argument}: {selector!r} is neither a glob of weight names nor an nn.Module type")
    elif selector == "first":
        found = {sites[0].name}
    elif selector == "last":
        in_eval = [site for site in sites if site.uses[0].mode == "eval"]
        found = {(in_eval or sites)[-1].name}
    elif selector == "depthwise":
        found = {site.name for site in sites if site.depthwise}
    else:
        found = {
            site.name
            for site in sites
            for name in (site.name, *site.aliases)
            if fnmatchcase(name, selector) or name.rpartition(".")[0] == selector
        }
        if not found:
            for item in uncovered:
                if fnmatchcase(item.name, selector):
                    raise SelectionError(f"{argument}: {item.name} cannot be masked: {item.reason}")
    if not found:
        label = selector if isinstance(selector, str) else selector.__name__
        if label in SELECTORS:
            raise SelectionError(f"{argument}: this model has no {label} weight site; leave {label!r} out")
        hint = nearest(label, [*(site.name for site in sites), *SELECTORS])
        raise SelectionError(f"{argument}: {label!r} matches no weight site{hint}")
    return found
