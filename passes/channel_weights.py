"""Labels through operations with a weight: they consume the labels of one of its dimensions and mint the other's.

A weight has one label an index along its first two dimensions, so a weight that is used several times (tied,
called at two resolutions, an embedding that is the output layer too) unites its uses by itself.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from fxsparse.core.channel_labels import LabelSource, along, fixed
from fxsparse.core.channel_rules import ChannelRule
from fxsparse.core.graphs import operand
from fxsparse.core.labelled_model import TensorReference
from fxsparse.core.operations import WEIGHTED
from fxsparse.core.records import record_of

from .label_run import LabelRun


def weight_labels(run: LabelRun, weight: TensorReference, dim: int, role: str) -> Tensor:
    """One label an index of a weight's dimension; `role` says what the operation does with its slices."""
    run.roles.setdefault((weight.name, dim), set()).add(role)
    return run.space.labels(LabelSource(weight.name, dim), (weight.tensor.shape[dim],))


def _weighted(run: LabelRun, node: fx.Node, rule: ChannelRule) -> Any:
    operation = WEIGHTED[node.target]
    positions = (("input", 0), ("weight", operation.weight), ("bias", operation.bias))
    values = {name: run.operands(operand(node, position, name)) for name, position in positions}
    input, weight, bias = run.elements(values["input"]), values["weight"], run.elements(values["bias"])
    if not isinstance(weight, TensorReference) or not isinstance(input, Tensor):
        return None  # a weight that is computed
    shape = record_of(node).spec.shape
    if operation.kernel_rank == 0:
        channel = len(shape) - 1
        consumed = run.space.unite_over(input, [channel], node.name)
        run.space.unite(consumed, weight_labels(run, weight, 1, "consumer"), node.name)
        minted = weight_labels(run, weight, 0, "producer")
    else:
        channel = len(shape) - operation.kernel_rank - 1
        groups = operand(node, 6, "groups") or 1
        consumed = run.space.unite_over(input, [channel], node.name)
        convolve = _transposed if "transpose" in operation.name else _convolved
        minted = convolve(run, consumed, weight, groups, node.name)
    if isinstance(bias, Tensor):
        run.space.unite(bias, minted, node.name)
    return along(minted, channel, shape)


def _convolved(run: LabelRun, consumed: Tensor, weight: TensorReference, groups: int, reason: str) -> Tensor:
    """Weight (out, in per group, *kernel): labels of the output channels."""
    per_group = weight.tensor.shape[1]
    if groups > 1 and per_group == 1:  # depthwise: output channels c * m to c * m + m - 1 belong to channel c
        minted = weight_labels(run, weight, 0, "copy")
        run.space.unite(minted.view(groups, -1), consumed.view(groups, 1), reason)
        return minted
    aligned = run.space.unite_over(consumed.view(groups, per_group), [1], reason)
    run.space.unite(aligned, weight_labels(run, weight, 1, "consumer"), reason)
    minted = weight_labels(run, weight, 0, "producer")
    run.space.unite_over(minted.view(groups, -1), [1], reason)
    return minted


def _transposed(run: LabelRun, consumed: Tensor, weight: TensorReference, groups: int, reason: str) -> Tensor:
    """Weight (in, out per group, *kernel): labels of the output channels."""
    inputs, per_group = weight.tensor.shape[:2]
    if groups > 1 and inputs == groups:
        run.space.unite(consumed, weight_labels(run, weight, 0, "copy"), reason)
        return consumed.repeat_interleave(per_group)
    rows = weight_labels(run, weight, 0, "consumer")
    run.space.unite(consumed, rows, reason)
    run.space.unite_over(rows.view(groups, -1), [1], reason)
    return weight_labels(run, weight, 1, "producer").repeat(groups)


def _embedding(run: LabelRun, node: fx.Node, rule: ChannelRule) -> Any:
    table = run.operands(operand(node, 1, "weight"))
    if not isinstance(table, TensorReference) or operand(node, 3, "max_norm") is not None:
        return None
    run.space.pin(weight_labels(run, table, 0, "producer"), f"it is a row of the embedding {table.name}")
    shape = record_of(node).spec.shape
    run.pin_all(run.operands(operand(node, 0, "input")), f"it chooses rows of the embedding {table.name}")
    return along(weight_labels(run, table, 1, "producer"), len(shape) - 1, shape)


def _mask(run: LabelRun, node: fx.Node, rule: ChannelRule) -> Any:
    """A masked weight takes part as the weight does."""
    return run.operands(node.args[0])


def _parameter_product(run: LabelRun, input: Tensor, weight: TensorReference, node: fx.Node) -> Tensor | None:
    """`x @ weight` with a weight (in, out)."""
    if weight.tensor.ndim != 2:
        return None
    consumed = run.space.unite_over(input, [-1], node.name)
    run.space.unite(consumed, weight_labels(run, weight, 0, "consumer"), node.name)
    shape = record_of(node).spec.shape
    return along(weight_labels(run, weight, 1, "producer"), len(shape) - 1, shape)


def _contraction(run: LabelRun, node: fx.Node, rule: ChannelRule) -> Any:
    """A product of two activations: everything that meets at one batch index (a head) is united."""
    first, second = (run.operands(operand(node, *place)) for place in ((0, "input"), (1, "other")))
    if isinstance(second, TensorReference) and isinstance(first, Tensor):
        return _parameter_product(run, first, second, node)
    first, second = run.elements(first), run.elements(second)
    if not isinstance(first, Tensor) or not isinstance(second, Tensor) or min(first.ndim, second.ndim) < 2:
        return None
    shape = record_of(node).spec.shape
    batch = shape[:-2]
    whole_first, whole_second = first.expand(*batch, *first.shape[-2:]), second.expand(*batch, *second.shape[-2:])
    if not first.any() and not second.any():
        return fixed(shape)
    if not first.any() and _keeps_columns(second):  # every column of the second stays a channel
        return run.space.unite_over(whole_second, [*range(len(batch)), -1], node.name).unsqueeze(-2).expand(shape)
    return _per_batch_index(run, [whole_first, whole_second], shape, node)


def _keeps_columns(labels: Tensor) -> bool:
    narrow = labels.narrow(-2, 0, 1)
    return bool((labels == narrow).all())


def _per_batch_index(run: LabelRun, operands: list[Tensor], shape: tuple[int, ...], node: fx.Node) -> Tensor:
    """Unites all labels of the operands, (*batch, n, k) each, per batch index; the product gets them."""
    kept = range(len(shape) - 2)
    united = [run.space.unite_over(labels, kept, node.name) for labels in operands]
    for labels in united[1:]:
        run.space.unite(united[0], labels, node.name)
    return united[0][..., None, None].expand(shape)


def _attention(run: LabelRun, node: fx.Node, rule: ChannelRule) -> Any:
    """Query, key and value (*batch, heads, positions, size): a head is one unit, with the heads it shares keys with."""
    query, key, value = (
        run.elements(run.operands(operand(node, position, name)))
        for position, name in enumerate(("query", "key", "value"))
    )
    if not all(isinstance(labels, Tensor) and labels.ndim >= 2 for labels in (query, key, value)):
        return None
    mask = run.elements(run.operands(operand(node, 3, "attn_mask")))
    shape = record_of(node).spec.shape
    if key.ndim > 2 and key.shape[-3] != query.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (labels.repeat_interleave(repeats, -3) for labels in (key, value))
    batch = shape[:-2]
    result = _per_batch_index(
        run, [labels.expand(*batch, *labels.shape[-2:]) for labels in (query, key, value)], shape, node
    )
    if isinstance(mask, Tensor):
        run.pin_all(mask, node.name)
        run.pin_where_varying(result, [dim - mask.ndim for dim in range(mask.ndim) if mask.shape[dim] > 1], node.name)
    return result


WEIGHTED_OPERATIONS: dict[str, Callable[[LabelRun, fx.Node, ChannelRule], Any]] = {
    "weighted": _weighted,
    "embedding": _embedding,
    "mask": _mask,
    "contraction": _contraction,
    "attention": _attention,
}
