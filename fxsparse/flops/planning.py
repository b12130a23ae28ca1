"""What a model would cost at a sparsity, without making masks: shapes and the allocation are enough."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..core.errors import ConfigError
from ..core.masking import floor_count
from ..passes.allocate_sparsity import allocate_sparsity
from ..passes.capture_annotated import capture_annotated
from ..passes.find_sites import find_sites
from ..passes.select_sites import Selectors, select_sites
from ..passes.solve_flop_budget import solve_flop_budget
from .counting import count_captured
from .flop_report import FlopReport


def plan_flops(
    model: nn.Module,
    example_input: Any,
    *,
    sparsity: float | None = None,
    flops: float | None = None,
    distribution: str | Mapping[str, float] = "erk",
    include: Selectors | None = None,
    exclude: Selectors = (),
    dense: Selectors = (),
    explicit: Mapping[str, float] | None = None,
    power: float = 1.0,
) -> FlopReport:
    """The cost of the sparse model that `sparsify` would make with the same options; works on meta tensors.

    Masks have `floor(s N)` weights removed, so the counts are those of the real masks, whichever weights
    they keep. Without a sparsity and without a budget this is the dense model.

    Raises:
        FxSparseError: as `sparsify` and `count_flops`.
    """
    captured = capture_annotated(model, example_input)
    report = count_captured(captured, model, example_input)
    if sparsity is not None and flops is not None:
        raise ConfigError("sparsity and flops: give one of the two, not both")
    if sparsity is None and flops is None:
        return report
    sites, uncovered = find_sites(captured)
    sites, stay_dense, _ = select_sites(captured, sites, uncovered, include=include, exclude=exclude, dense=dense)
    options: dict[str, Any] = {"dense": stay_dense, "explicit": explicit, "power": power}
    if flops is not None:
        sparsity = solve_flop_budget(report.nodes, sites, flops, distribution, **options)
    assert sparsity is not None
    sparsities = allocate_sparsity(sites, sparsity, distribution, **options)
    active = {site.name: site.numel - floor_count(sparsities[site.name], site.numel) for site in sites}
    return report.at(active, {name: 1.0 - value for name, value in sparsities.items()})
