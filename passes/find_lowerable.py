"""Which sites can be lowered to sparse operators, with every call that uses them; and why the others cannot."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxsparse.core.graphs import attribute, operand
from fxsparse.core.masking import apply_mask
from fxsparse.core.operations import FUSED, WEIGHTED
from fxsparse.core.records import Captured, TensorSpec, WeightSite, record_of

_RANKS = {"linear": 0, "conv1d": 1, "conv2d": 2}
_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class SparseCall:
    """A call of a weight, as a convolution over two dimensions.

    Attributes:
        mode, node: the graph and the node.
        linear: whether it is a linear layer.
        input: the node's input.
        output: its output.
        weight: `(out, in per group, height, width)` of the dense weight.
        stride, padding, dilation: of the two dimensions.
    """

    mode: str
    node: str
    linear: bool
    input: TensorSpec
    output: TensorSpec
    weight: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def key(self) -> str:
        """Name of the call among those of a module."""
        return f"{self.mode}/{self.node}"


def find_lowerable(
    captured: Captured, sites: Sequence[WeightSite]
) -> tuple[dict[str, list[SparseCall]], dict[str, str]]:
    """Sorts the sites of masked graphs.

    Returns:
        Of each site that can be lowered its calls; of every other one the reason.
    """
    calls: dict[str, list[SparseCall]] = {}
    reasons: dict[str, str] = {}
    hidden = names_in_units(captured)
    masked: dict[str, list[tuple[str, fx.Node]]] = {site.name: [] for site in sites}
    for mode, graph in captured.distinct_graphs():
        for node in graph.find_nodes(op="call_function", target=apply_mask):
            masked[str(node.args[0].target)].append((mode, node))
    for site in sites:
        found, reason = _calls_of(captured, site, masked[site.name])
        if site.name in hidden:
            reason = "it is used inside a submodule that stays one call"
        if reason:
            reasons[site.name] = reason
        else:
            calls[site.name] = found
    return calls, reasons


def find_whole(captured: Captured) -> dict[str, list[SparseCall]]:
    """By the weight's name, convolutions of the eval graph whose weights are all active: kernels may run them."""
    found: dict[str, list[SparseCall]] = {}
    for node in captured.graphs["eval"].nodes:
        weight = operand(node, 1, "weight") if node.target in (torch.conv1d, torch.conv2d) else None
        source = _unmasked(captured, weight) if isinstance(weight, fx.Node) else None
        if source is None:
            continue
        tensor = attribute(captured.model, str(source.target))
        call = call_of("eval", node, weight, tuple(tensor.shape))  # type: ignore[arg-type]
        if isinstance(call, SparseCall) and tensor.dtype in _DTYPES and tensor.device.type == "cpu":
            found.setdefault(str(source.target), []).append(call)
    return found


def _unmasked(captured: Captured, weight: fx.Node) -> fx.Node | None:
    """The weight itself, if it has no mask or one that leaves out nothing."""
    if weight.target is apply_mask:
        source, mask, _ = weight.args
        whole = isinstance(mask, fx.Node) and bool(attribute(captured.model, str(mask.target)).all())
        return source if whole and isinstance(source, fx.Node) and source.op == "get_attr" else None
    return weight if weight.op == "get_attr" else None


def whole_block(call: SparseCall) -> int:
    """Output channels that share a pattern where all weights of a call are active."""
    per_group = call.weight[0] // max(call.groups, 1)
    return next(block for block in (4, 2, 1) if per_group % block == 0)


def names_in_units(captured: Captured) -> set[str]:
    """What is read inside submodules that stay one call."""
    units = captured.units.distinct_graphs() if captured.units else ()
    return {str(node.target) for _, _, graph in units for node in graph.find_nodes(op="get_attr")}


def _calls_of(
    captured: Captured, site: WeightSite, masked: Sequence[tuple[str, fx.Node]]
) -> tuple[list[SparseCall], str]:
    weight = attribute(captured.model, site.name)
    if site.form or (site.matrix and site.matrix != site.shape) or site.aliases or site.tied_embedding:
        return [], "the weight is computed from its parameter, or shared"
    if weight.device.type not in ("cpu", "meta"):
        return [], f"it is on {weight.device.type}; the kernels are for the CPU"
    if weight.dtype not in _DTYPES:
        return [], f"it is {weight.dtype}; the kernels are for float32 and float64"
    calls = []
    for mode, node in masked:
        for user in node.users:
            call = call_of(mode, user, node, site.shape)
            if isinstance(call, str):
                return [], call
            calls.append(call)
    if not calls:
        return [], "no call in the graph uses it"
    if len({call.groups for call in calls}) > 1:
        return [], "its calls have different groups"
    return calls, ""


def call_of(mode: str, node: fx.Node, weight: fx.Node, shape: tuple[int, ...]) -> SparseCall | str:
    """The call of a weight at a node, or why it is none that a sparse kernel could do."""
    if node.target is torch.gru:
        return "a gru has a sparse kernel for inference alone"
    if node.target in FUSED:
        return f"{FUSED[node.target].name} has no sparse kernel"  # type: ignore[index]
    operation = WEIGHTED.get(node.target) if callable(node.target) else None
    if (
        operation is None
        or operand(node, operation.weight, "weight") is not weight
        or list(node.args).count(weight) > 1
    ):
        return f"node {node.name} uses it as something else than a weight"
    rank = _RANKS.get(operation.name)
    if rank is None:
        return f"{operation.name} has no sparse kernel"
    source, result = record_of(operand(node, 0, "input")).spec, record_of(node).spec
    if not isinstance(source, TensorSpec) or not isinstance(result, TensorSpec):
        return f"the shapes at node {node.name} are not known"
    if rank == 0:
        one, none = (1, 1), (0, 0)
        return SparseCall(mode, node.name, True, source, result, (*shape, 1, 1), one, none, one, 1)  # type: ignore[arg-type]
    if len(source.shape) != rank + 2:
        return f"node {node.name} is called without a batch"
    stride, dilation = _pair(node, 3, "stride", 1, rank), _pair(node, 5, "dilation", 1, rank)
    padding, groups = _pair(node, 4, "padding", 0, rank), operand(node, 6, "groups")
    groups = 1 if groups is None else groups
    if padding is None:
        padding = _padding_by_name(operand(node, 4, "padding"), shape, stride, dilation)
    if stride is None or padding is None or dilation is None or not isinstance(groups, int):
        return f"node {node.name} has settings that are not numbers, or pads one side more than the other"
    kernel = (1,) * (2 - rank) + shape[2:]
    return SparseCall(
        mode,
        node.name,
        False,
        source,
        result,
        (*shape[:2], *kernel),
        stride,
        padding,
        dilation,
        groups,  # type: ignore[arg-type]
    )


def _pair(node: fx.Node, position: int, name: str, default: int, rank: int) -> Any:
    """A setting as two numbers; a convolution over one dimension has one row. None if it is something else."""
    value = operand(node, position, name)
    value = default if value is None else value
    given = (value,) * rank if isinstance(value, int) else value
    if not isinstance(given, (tuple, list)) or not all(type(entry) is int for entry in given):
        return None
    given = tuple(given) * (rank if len(given) == 1 else 1)
    return (default,) * (2 - rank) + given


def _padding_by_name(name: Any, shape: tuple[int, ...], stride: Any, dilation: Any) -> tuple[int, int] | None:
    if name == "valid":
        return 0, 0
    if name != "same" or dilation is None:
        return None
    kernel = (1,) * (4 - len(shape)) + shape[2:]
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return None if any(amount % 2 for amount in total) else (total[0] // 2, total[1] // 2)
