"""Which layers are lowered: what could be, what is worth it, and why the rest stays dense."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from ..captured_module import CapturedModule
from ..core.allocation import match_names
from ..core.errors import ConfigError
from ..core.granularity import Blocks, Granularity
from ..core.graphs import attribute, copy_graph
from ..core.records import Captured, WeightSite
from ..passes.annotate_shapes import annotate_shapes
from ..passes.find_lowerable import SparseCall, find_lowerable, find_whole, whole_block
from ..passes.open_leaves import open_leaves
from .cost_model import CostModel

LAYERS = ("auto", "all")
"""Choices of `layers`, beside globs of weight names: what the cost model finds faster, or all that can be."""

DENSE_IS_FASTER = "dense is faster"
"""Why a weight is left dense whose sparse calls the cost model finds slower."""


@dataclass(frozen=True)
class Decision:
    """Of one site.

    Attributes:
        name: of the weight.
        lowered: whether its calls compute with active weights alone.
        reason: why not; empty where they do.
        density: of the weight at the time.
        sparse_seconds, dense_seconds: what all its calls of the example take, as the cost model has it; NaN where it
            was not asked. Forward, and for training both backward passes.
    """

    name: str
    lowered: bool
    reason: str
    density: float
    sparse_seconds: float = float("nan")
    dense_seconds: float = float("nan")


def captured_by(module: CapturedModule, example: tuple[tuple, dict[str, Any]]) -> Captured:
    """Copies of a module's graphs over its own tensors, with the shapes of an example of specs."""
    graphs = {"eval": copy_graph(module.graphs["eval"])}
    shared = module.graphs["train"] is module.graphs["eval"]
    graphs["train"] = graphs["eval"] if shared else copy_graph(module.graphs["train"])
    captured = Captured(
        *(module._get_name(), module, graphs, example, module.capture, module.notes, module.flags),
        mode_readers=module.mode_readers,
        reason=module.capture_reason,
        units=module.units,
    )
    annotate_shapes(captured)
    open_leaves(captured)
    return captured


def kernel_block(site: WeightSite, granularity: Granularity) -> int:
    """How many output channels of a weight share a pattern that a kernel can use: the most, of those that one has."""
    rows = granularity.rows if isinstance(granularity, Blocks) and site.output_dim == 0 else 1
    per_group = site.shape[0] // max(site.output_groups, 1)
    return next(block for block in (8, 4, 2, 1) if rows % block == 0 and per_group % block == 0)


def decide(
    captured: Captured,
    sites: Sequence[WeightSite],
    active: Mapping[str, int],
    blocks: Mapping[str, int],
    layers: str | Sequence[str],
    train: bool,
    cost_model: CostModel | None = None,
) -> tuple[list[Decision], dict[str, list[SparseCall]]]:
    """What is done with every site, and the calls of those that are lowered.

    Args:
        captured: masked graphs, annotated with the shapes of the example that counts.
        active: weight -> number of its active elements.
        blocks: weight -> output channels that share a pattern.
        layers: `"auto"`, `"all"`, or globs of weight names.
        train: whether both gradients count.

    Raises:
        ConfigError: `layers` that is none of these.
        SelectionError: a glob that matches no weight.
    """
    calls, reasons = find_lowerable(captured, sites)
    wanted = wanted_layers(layers, [site.name for site in sites])
    model = cost_model or CostModel()
    decisions = []
    for site in sites:
        density = active[site.name] / max(site.numel, 1)
        if site.name in reasons:
            decisions.append(Decision(site.name, False, reasons[site.name], density))
        elif wanted is not None:
            own = site.name in wanted
            decisions.append(
                Decision(site.name, own, "" if own else "not among the layers that were asked for", density)
            )
        else:
            mode = "train" if train and any(call.mode == "train" for call in calls[site.name]) else "eval"
            own_calls = [call for call in calls[site.name] if call.mode == mode]
            weight = captured.model.get_parameter(site.name)
            estimates = [model.estimate(call, density, blocks[site.name], weight.dtype, train) for call in own_calls]
            sparse, dense = sum(e.sparse for e in estimates), sum(e.dense for e in estimates)
            faster = sparse < dense
            decisions.append(Decision(site.name, faster, "" if faster else DENSE_IS_FASTER, density, sparse, dense))
    chosen = {decision.name for decision in decisions if decision.lowered}
    return decisions, {name: found for name, found in calls.items() if name in chosen}


def decide_whole(
    captured: Captured, layers: str | Sequence[str], cost_model: CostModel | None = None
) -> tuple[list[Decision], list[SparseCall]]:
    """For inference: which dense convolutions, such as the first and depthwise ones, a kernel runs faster."""
    if layers != "auto":
        return [], []
    model = cost_model or CostModel()
    decisions: list[Decision] = []
    chosen: list[SparseCall] = []
    for name, calls in find_whole(captured).items():
        dtype = attribute(captured.model, name).dtype
        estimates = [model.estimate(call, 1.0, whole_block(call), dtype, False, between=True) for call in calls]
        sparse, dense = sum(e.sparse for e in estimates), sum(e.dense for e in estimates)
        faster = sparse < dense
        chosen += calls if faster else []
        decisions.append(Decision(name, faster, "" if faster else DENSE_IS_FASTER, 1.0, sparse, dense))
    return decisions, chosen


def wanted_layers(layers: Any, names: Sequence[str]) -> set[str] | None:
    """The weights that `layers` names; None for `"auto"`."""
    if layers == "auto":
        return None
    if layers == "all":
        return set(names)
    if isinstance(layers, str) or not all(isinstance(glob, str) for glob in layers):
        raise ConfigError(f"layers: {layers!r} is none of {', '.join(LAYERS)}, nor a list of globs of weight names")
    return {name for glob in layers for name in match_names(glob, names, "layers")}


def decision_table(decisions: Sequence[Decision], heading: Sequence[str] = ()) -> str:
    """The decisions for a person to read, with the cost model's estimates."""

    def milliseconds(seconds: float) -> str:
        return "-" if seconds != seconds else f"{1e3 * seconds:.3f}"

    rows = [
        [
            decision.name,
            f"{decision.density:.4f}",
            "sparse" if decision.lowered else "dense",
            milliseconds(decision.sparse_seconds),
            milliseconds(decision.dense_seconds),
            decision.reason,
        ]
        for decision in decisions
    ]
    header = ["weight", "density", "runs", "sparse ms", "dense ms", "why dense"]
    return "\n".join([*heading, tabulate(rows, header, disable_numparse=True)])


def decision_report(decisions: Sequence[Decision]) -> str:
    """How many weights run on sparse kernels, and the table."""
    sparse = sum(decision.lowered for decision in decisions)
    return decision_table(decisions, [f"{sparse} of {len(decisions)} weights run on sparse kernels"])


def why_none(decisions: Sequence[Decision]) -> str:
    """Why no weight is lowered, in a few words: the reason that most have. Empty where one is."""
    if not decisions or any(decision.lowered for decision in decisions):
        return ""
    [(reason, count)] = Counter(decision.reason for decision in decisions).most_common(1)
    said = "dense kernels are estimated faster at these sizes and densities" if reason == DENSE_IS_FASTER else reason
    return said if count == len(decisions) else f"{said} ({count} of them)"
