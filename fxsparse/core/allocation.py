"""How overall sparsity is spread over the weight sites: uniform, ER, ERK, explicit numbers, mixtures.

`allocate` works on shapes alone; the pass over a graph (`passes/allocate_densities.py`) calls it with the
shapes of the graph's sites. Sources: Mocanu et al. 2018 (Erdos-Renyi), Evci et al. 2020, section 3 and
appendix (Erdos-Renyi-Kernel: the kernel's sides enter the sum).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real

from .errors import AllocationError, ConfigError, SelectionError, check_number, nearest
from .flop_budget import solve_flop_budget

Shape = Sequence[int]


def _er(shape: Shape) -> float:
    """Erdos-Renyi: density in proportion to `(n_in + n_out) / (n_in n_out)`; kernels play no part."""
    n_out, n_in = shape[:2]
    return (n_in + n_out) / (n_in * n_out)


def _erk(shape: Shape) -> float:
    """Erdos-Renyi-Kernel: `(n_in + n_out + sum(kernel)) / (n_in n_out prod(kernel))`; a linear stays ER."""
    n_out, n_in, *kernel = shape
    return (n_in + n_out + sum(kernel)) / (n_in * n_out * math.prod(kernel))


RAW_DENSITY = {"er": _er, "erk": _erk}
"""Distribution -> density of a shape up to the common factor that the budget decides."""

DISTRIBUTIONS = ("uniform", *RAW_DENSITY)


def allocate(
    shapes: Mapping[str, Shape],
    sparsity: float | None = None,
    distribution: str | Mapping[str, float] = "erk",
    *,
    dense: Collection[str] = (),
    explicit: Mapping[str, float] | None = None,
    power: float = 1.0,
    dense_inside: bool = True,
    flops: float | None = None,
    macs: Mapping[str, int] | None = None,
    other_macs: int = 0,
    matrices: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Sparsity of every site, such that the whole meets `sparsity`, or costs `flops` of the dense model.

    Args:
        shapes: name -> weight shape in torch's order, `(out, in, *kernel)`; `in` is per group. The order
            matters to `uniform` alone, which keeps the first site dense.
        sparsity: fraction of all elements to remove, in [0, 1). Under `er` and `erk` the result satisfies
            `sum(s_l N_l) = sparsity * sum(N_l)`; under `uniform` every site but the first has exactly this
            sparsity, so the whole is slightly less sparse (as in the paper).
        distribution: `"uniform"`, `"er"`, `"erk"`, or a mapping from every name (or glob) to its sparsity.
        dense: names or globs of sites that stay at density 1 inside the budget.
        explicit: name or glob -> sparsity of sites that are given rather than solved; inside the budget.
        power: exponent on the ER and ERK proportions (0 makes them equal, 1 is the paper).
        dense_inside: whether the sites in `dense` count in the budget, so that the others make up for them.
        flops: instead of `sparsity`: cost over the dense cost, in (0, 1], met to one part in a thousand.
        macs, other_macs: with `flops`: name -> dense MACs of the site's calls, and the MACs of what has no site.
        matrices: name -> how many matrices of its shape a weight holds (a bank of experts); 1 where not given. Its
            density is that of one of them, its size that of all.

    Returns:
        name -> sparsity, in the order of `shapes`.

    Raises:
        AllocationError: `sparsity` outside [0, 1), no sites, a shape without two dimensions, or no solution.
        ConfigError: an unknown distribution.
        SelectionError: a name or glob that matches nothing, or a site given twice.
    """
    if (sparsity is None) == (flops is None) or (flops is not None and macs is None):
        raise ConfigError("allocate: give a sparsity, or flops together with macs (the dense MACs of every site)")
    if flops is not None and macs is not None:
        given = {"dense": dense, "explicit": explicit, "power": power}
        given |= {"dense_inside": dense_inside, "matrices": matrices}

        def allocated(overall: float) -> dict[str, float]:
            return allocate(shapes, overall, distribution, **given)  # type: ignore[arg-type]

        sizes = _sizes(shapes, matrices)
        return allocated(solve_flop_budget(sizes, flops, allocated, macs, other_macs))
    assert sparsity is not None
    _check_sparsity("sparsity", sparsity)
    check_number("power", power)
    if not isinstance(shapes, Mapping):
        raise ConfigError(f"shapes: a {type(shapes).__name__}; give a mapping from names to shapes (out, in, *kernel)")
    if not shapes:
        raise AllocationError("allocate: there are no weight sites to spread the sparsity over")
    for name, shape in shapes.items():
        if not isinstance(shape, Sequence) or len(shape) < 2 or math.prod(shape) == 0:
            raise AllocationError(f"allocate: {name} has shape {shape}; expected (out, in, *kernel), none 0")

    fixed = _fixed_sparsities(shapes, dense, explicit or {})
    if not isinstance(distribution, str):
        fixed |= _expand(shapes, distribution, "distribution")
        missing = [name for name in shapes if name not in fixed]
        if missing:
            raise SelectionError(
                f"distribution: no sparsity given for {', '.join(missing)}; "
                "name every site, or use explicit= beside a named distribution"
            )
        return {name: fixed[name] for name in shapes}
    if distribution == "uniform":
        first = next(iter(shapes))
        return {name: fixed.get(name, 0.0 if name == first else sparsity) for name in shapes}
    if distribution not in RAW_DENSITY:
        raise ConfigError(
            f"distribution: {distribution!r} is not one of {', '.join(DISTRIBUTIONS)}"
            + nearest(distribution, DISTRIBUTIONS)
        )
    raw = {name: RAW_DENSITY[distribution](shape) ** power for name, shape in shapes.items() if name not in fixed}
    outside = set() if dense_inside else {name for pattern in dense for name in match_names(pattern, shapes, "dense")}
    sizes = {name: size for name, size in _sizes(shapes, matrices).items() if name not in outside}
    inside = {name: value for name, value in fixed.items() if name in sizes}
    densities = _solve_densities(sizes, raw, inside, sparsity) if sizes else {}
    return {name: fixed[name] if name in fixed else 1.0 - densities[name] for name in shapes}


def _sizes(shapes: Mapping[str, Shape], matrices: Mapping[str, int] | None) -> dict[str, int]:
    return {name: math.prod(shape) * (matrices or {}).get(name, 1) for name, shape in shapes.items()}


def _solve_densities(
    sizes: Mapping[str, int], raw: Mapping[str, float], fixed: Mapping[str, float], sparsity: float
) -> dict[str, float]:
    """Densities `min(1, scale * raw)` of the sites in `raw` that bring the whole to `sparsity`.

    Making one site dense gives the others more, never less, so whoever passes 1 stays there: the loop ends
    after at most as many rounds as there are sites.
    """
    budget = (1.0 - sparsity) * sum(sizes.values()) - sum((1.0 - s) * sizes[name] for name, s in fixed.items())
    available = sum(sizes[name] for name in raw)
    slack = 1e-9 * sum(sizes.values())
    if budget < -slack or budget > available + slack:
        raise AllocationError(
            f"no solution: the given sites keep {sum((1 - s) * sizes[n] for n, s in fixed.items()):,.0f} of the "
            f"{(1 - sparsity) * sum(sizes.values()):,.0f} weights that sparsity {sparsity} allows, and the other "
            f"{len(raw)} sites hold {available:,}; change the sparsity, or give fewer sites"
        )
    if not raw:
        return {}
    densities: dict[str, float] = {}
    open_sites = dict(raw)
    while open_sites:
        scale = max(budget, 0.0) / sum(open_sites[name] * sizes[name] for name in open_sites)
        full = [name for name, value in open_sites.items() if scale * value >= 1.0]
        if not full:
            return densities | {name: scale * value for name, value in open_sites.items()}
        for name in full:
            densities[name] = 1.0
            budget -= sizes[name]
            del open_sites[name]
    return densities


def _check_sparsity(what: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise AllocationError(f"{what}: {value!r} is not a number; give one in [0, 1)")
    if not 0.0 <= value < 1.0:
        raise AllocationError(f"{what}: {value} is outside [0, 1); 0.9 removes nine weights of ten")


def match_names(pattern: str, names: Collection[str], argument: str) -> list[str]:
    """The names that `pattern` (a name or a glob) matches, or a SelectionError with near names."""
    matches = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
    if not matches:
        raise SelectionError(f"{argument}: {pattern!r} matches no weight site{nearest(pattern, names)}")
    return matches


def _expand(shapes: Mapping[str, Shape], given: Mapping[str, float], argument: str) -> dict[str, float]:
    expanded: dict[str, float] = {}
    for pattern, value in given.items():
        if not isinstance(value, Real) or not 0.0 <= value <= 1.0:
            raise AllocationError(f"{argument}: sparsity {value!r} of {pattern!r} is outside [0, 1]")
        for name in match_names(pattern, shapes, argument):
            expanded[name] = value
    return expanded


def _fixed_sparsities(
    shapes: Mapping[str, Shape], dense: Collection[str], explicit: Mapping[str, float]
) -> dict[str, float]:
    fixed = _expand(shapes, explicit, "explicit")
    for pattern in dense:
        for name in match_names(pattern, shapes, "dense"):
            if fixed.get(name, 0.0) != 0.0:
                raise SelectionError(f"dense: {name} is also given sparsity {fixed[name]}; name it once")
            fixed[name] = 0.0
    return fixed
