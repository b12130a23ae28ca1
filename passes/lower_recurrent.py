"""Replaces GRU calls by sparse ones, for inference: `gru(x, h, [apply_mask(...), ...])` -> `lowered_gru(linear(x), h)`.

What the gates take from the input is a linear layer of its own, dense or sparse. Where the input is an embedding, the
table is multiplied with the weight beforehand, and the layer is a lookup.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxsparse.core.graphs import attribute, copy_graph
from fxsparse.core.masking import apply_mask
from fxsparse.core.operations import FUSED
from fxsparse.core.records import Captured, TensorSpec, WeightSite, record_of, update_record
from fxsparse.kernels import SparsePattern
from fxsparse.kernels.calls import fused_linear
from fxsparse.kernels.recurrent import TiledGRU, lowered_gru

_PARTS = ("values", "runs", "rows", "places", "stored", "units", "bias")
INPUTS = ("dense", "sparse", "table")
"""How what the gates take from the input is computed."""

_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class SparseRecurrence:
    """A GRU call of one layer and direction in the eval graph, its two weights masked.

    Attributes:
        node: its name.
        weights: names of the input's weight and the state's.
        biases: of the same; None for none.
        input, state: of the first two arguments.
        batch_first: whether the input is (batch, time, inputs), else (time, batch, inputs).
        may_look_up: whether the input is an embedding whose table, multiplied with the weight, is no larger than both
            weights.
        by: of `INPUTS`.
    """

    node: str
    weights: tuple[str, str]
    biases: tuple[str | None, str | None]
    input: TensorSpec
    state: TensorSpec
    batch_first: bool
    may_look_up: bool = False
    by: str = "dense"


def find_recurrences(captured: Captured, sites: Sequence[WeightSite]) -> tuple[list[SparseRecurrence], dict[str, str]]:
    """The GRU calls of a masked eval graph that can be lowered.

    Args:
        captured: annotated with shapes.

    Returns:
        These calls; and of each site that any other recurrent call reads, why that one stays dense.
    """
    found: list[SparseRecurrence] = []
    reasons: dict[str, str] = {}
    graph = captured.graphs["eval"]
    known = {site.name: site for site in sites}
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in FUSED:
            continue
        read = [str(source.args[0].target) for source in node.all_input_nodes if source.target is apply_mask]  # type: ignore[union-attr]
        call = _recurrence(captured.model, node, known)
        if isinstance(call, str):
            reasons.update((name, call) for name in read)
        else:
            found.append(call)
    return found, reasons


def _recurrence(model: nn.Module, node: fx.Node, sites: dict[str, WeightSite]) -> SparseRecurrence | str:
    name = FUSED[node.target].name  # type: ignore[index]
    if node.target is not torch.gru:
        return f"{name} has no sparse kernel"
    if node.kwargs or len(node.args) != 9 or not isinstance(node.args[3], bool):
        return "a packed sequence has no sparse kernel"
    x, h, given, has_biases, layers, _, _, both_ways, batch_first = node.args
    if layers != 1 or both_ways is not False or not isinstance(batch_first, bool):
        return f"a {name} of several layers or both directions has no sparse kernel"
    weights = [_site(operand, sites) for operand in given[:2]]  # type: ignore[index]
    if None in weights:
        return "a weight of its call is not masked, or computed from its parameter, or shared"
    biases: list[str | None] = [None, None]
    if has_biases:
        biases = [_parameter(operand) for operand in given[2:4]]  # type: ignore[index]
        if None in biases:
            return "a bias of its call is computed"
    specs = [record_of(item).spec for item in (x, h) if isinstance(item, fx.Node)]
    if len(specs) != 2 or not all(isinstance(spec, TensorSpec) and len(spec.shape) == 3 for spec in specs):
        return f"the shapes at node {node.name} are not known"
    tensors = [attribute(model, item) for item in (*weights, *biases) if item is not None]
    if any(tensor.device.type not in ("cpu", "meta") for tensor in tensors):
        return f"it is on {tensors[0].device.type}; the kernels are for the CPU"
    if len({tensor.dtype for tensor in tensors}) > 1 or tensors[0].dtype not in _DTYPES:
        return f"it is {tensors[0].dtype}; the kernels are for float32 and float64"
    if tensors[1].shape[1] * 3 != tensors[0].shape[0]:
        return f"a projected {name} has no sparse kernel"
    if any(user.target is not operator.getitem for user in node.users):
        return f"the outputs of node {node.name} are used as one"
    table = _table(model, x)
    sizes = [attribute(model, str(item)).numel() for item in weights]
    small = table is not None and table.shape[0] * attribute(model, str(weights[0])).shape[0] <= sum(sizes)
    return SparseRecurrence(node.name, tuple(weights), tuple(biases), *specs, batch_first, small)  # type: ignore[arg-type]


def _table(model: nn.Module, x: object) -> Tensor | None:
    """The table of which a node looks rows up, and does nothing else."""
    if not isinstance(x, fx.Node) or x.target is not F.embedding:
        return None
    arguments = dict(zip(_EMBEDDING, x.args, strict=False)) | x.kwargs
    name = _parameter(arguments["weight"])
    changes = arguments.get("max_norm") is not None
    return None if name is None or changes else attribute(model, name)


_EMBEDDING = "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse".split()


def _site(operand: fx.Node, sites: dict[str, WeightSite]) -> str | None:
    """The site that a masked weight is, if it is the parameter as it stands."""
    if operand.target is not apply_mask:
        return None
    name = _parameter(operand.args[0])
    site = sites.get(name or "")
    return None if site is None or site.form or site.aliases or site.tied_embedding else name


def _parameter(operand: object) -> str | None:
    return str(operand.target) if isinstance(operand, fx.Node) and operand.op == "get_attr" else None


def tiled(model: nn.Module, call: SparseRecurrence) -> TiledGRU:
    """The weights of a call as its kernel takes them."""
    weights = [attribute(model, name) for name in call.weights]
    masks = [attribute(model, f"{name}_mask") for name in call.weights]
    return TiledGRU.of(*weights, *masks, *[None if name is None else attribute(model, name) for name in call.biases])


@torch.no_grad()
def lower_recurrent(
    model: nn.Module, graph: fx.Graph, calls: Sequence[SparseRecurrence]
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """A copy of a masked eval graph in which some GRU calls compute with their active weights alone.

    Args:
        model: what the graph's attributes refer to; not changed.

    Returns:
        The graph, and its new tensors by the names under which it reads them.
    """
    lowered = copy_graph(graph)
    nodes = {node.name: node for node in lowered.nodes}
    tensors: dict[str, Tensor] = {}
    for call in calls:
        node, weights = nodes[call.node], tiled(model, call)
        with lowered.inserting_before(node):

            def own(part: str, tensor: Tensor, name: str = call.node) -> fx.Node:
                tensors[f"{name}_{part}"] = tensor
                return lowered.create_node("get_attr", f"{name}_{part}")

            from_input = _from_input(model, call, node.args[0], weights, own)  # type: ignore[arg-type]
            values, *tiles, bias = [own(part, getattr(weights, part)) for part in _PARTS]
            new = lowered.call_function(lowered_gru, (from_input, node.args[1], values, tiles, bias, call.batch_first))
        update_record(from_input, module=record_of(node).module)
        update_record(new, module=record_of(node).module, spec=record_of(node).spec)
        read = [source for source in node.all_input_nodes if source.target is apply_mask]
        node.replace_all_uses_with(new)
        lowered.erase_node(node)
        new.name = call.node
        for masked in read:
            _erase_unread(masked)
    for node in reversed(list(lowered.nodes)):  # an embedding that nothing reads any more, and its table
        if node.op == "get_attr" or node.target is F.embedding:
            _erase_unread(node)
    lowered.lint()
    return lowered, tensors


def _from_input(
    model: nn.Module, call: SparseRecurrence, x: fx.Node, weights: TiledGRU, own: Callable[[str, Tensor], fx.Node]
) -> fx.Node:
    """The node of what the gates take from the input `x`; `own` gives a tensor a name."""
    dense, added, graph = weights.input_weight, weights.input_bias, x.graph
    if call.by == "table":
        table = _table(model, x)
        assert table is not None
        return graph.call_function(
            F.embedding, (x.args[0] if x.args else x.kwargs["input"], own("table", F.linear(table, dense, added)))
        )
    if call.by == "dense":
        return graph.call_function(F.linear, (x, own("input_weight", dense), own("input_bias", added)))
    pattern = SparsePattern.of(weights.input_mask)
    places = [own("input_starts", pattern.starts), own("input_columns", pattern.columns)]
    values, bias = own("input_values", pattern.gather(dense)), own("input_bias", added)
    return graph.call_function(fused_linear, (x, values, places, bias, len(dense), 1, None, None))


def _erase_unread(node: fx.Node) -> None:
    if not node.users:
        node.graph.erase_node(node)
