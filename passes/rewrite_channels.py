"""Rewrites a labelled graph for fewer channels: the constants in it, and views that have to become gathers.

Convolutions, norms and elementwise operations need nothing but smaller tensors. What has numbers of channels
among its arguments gets new ones: sizes of views, sections of splits, ranges of slices, `groups`, padding. Every
rewritten movement is then executed on element numbers, in full and in small, and compared; one that does not
come out the same becomes a gather from further up, or is refused by `CannotRewrite`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxsparse.core.channel_labels import LabelSource, narrowed
from fxsparse.core.channel_rules import channel_rule
from fxsparse.core.errors import FxSparseError
from fxsparse.core.graphs import copy_graph, drop_unused_arithmetic, operand, operation_name
from fxsparse.core.labelled_model import LabelledModel, TensorReference
from fxsparse.core.operations import WEIGHTED
from fxsparse.core.records import record_of

from .channel_movement import execute
from .check_rectangles import gather_of, is_moved
from .find_zeros import NORMS
from .rewrite_movement import new_arguments
from .rewrite_norms import pad_norm

Box = list[Tensor | None]
"""Per dimension the indices that are kept, in order; None where all are."""


class CannotRewrite(FxSparseError):
    """A node that cannot be written for these channels; the caller keeps them."""

    def __init__(self, mode: str, node: str) -> None:
        super().__init__(f"node {node} of the {mode} graph cannot be written for fewer channels")
        self.mode, self.node = mode, node


@dataclass
class Rewritten:
    """A graph for fewer channels.

    Attributes:
        graph: to be run on the cut tensors.
        indices: attribute name -> index of a gather, to be set on the model as a buffer.
        groups: weight name -> the number of groups of the convolutions with it.
    """

    graph: fx.Graph
    indices: dict[str, Tensor] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)


def box_of(labels: Tensor, gone: Tensor) -> Box | None:
    """What is left of a tensor, per dimension; None where that is no rectangular tensor."""
    narrow = narrowed(labels)
    keep = ~gone[narrow]
    if bool(keep.all()):
        return [None] * labels.ndim
    box: Box = []
    count = 1
    for dim in range(keep.ndim):
        others = [other for other in range(keep.ndim) if other != dim]
        along = keep.amax(others) if others else keep
        kept = along.nonzero().reshape(-1)
        count *= len(kept)
        box.append(None if len(kept) == len(along) else kept)
    return box if count == int(keep.sum()) else None


def cut(tensor: Tensor, box: Box) -> Tensor:
    for dim, kept in enumerate(box):
        if kept is not None:
            tensor = tensor.index_select(dim, kept.to(tensor.device))
    return tensor


def rewrite_channels(labelled: LabelledModel, mode: str, gone: Tensor) -> Rewritten:
    """The graph of one mode without the channels whose labels are `gone` (bool, one a label).

    Raises:
        CannotRewrite: a node that needs channels which are gone.
    """
    return _Rewriter(labelled, mode, gone).run()


class _Rewriter:
    def __init__(self, labelled: LabelledModel, mode: str, gone: Tensor) -> None:
        self.labelled = labelled
        self.root = self.model = labelled.captured.model
        self.mode = mode
        self.gone = gone
        self.labels = {name: self._as_labels(value) for name, value in labelled.nodes[mode].items()}
        self.old = {node.name: node for node in labelled.captured.graphs[mode].nodes}
        self.result = Rewritten(copy_graph(labelled.captured.graphs[mode]))

    def run(self) -> Rewritten:
        graph = self.result.graph
        for node in list(graph.nodes):
            if node.op in ("placeholder", "get_attr", "output"):
                continue
            if not _tensors(self.labels[node.name]):
                self._keep_number(node)
            elif self._is_touched(node):
                self._rewrite(node)
        _drop_unused_movements(self.model, graph)
        drop_unused_arithmetic(graph)
        graph.lint()
        return self.result

    def _as_labels(self, value: Any) -> Any:
        """A parameter that takes part by its elements has labels like any tensor."""
        if not isinstance(value, TensorReference):
            return value
        source = LabelSource(value.name)
        blocks = self.labelled.space.blocks
        return self.labelled.space.labels(source, blocks[source][1]) if source in blocks else value

    def labels_of(self, node: fx.Node) -> Any:
        return self.labels[node.name]

    def operands(self, tree: Any) -> Any:
        """Plain arguments as they are for the example."""
        return fx.map_arg(tree, lambda node: record_of(node).spec)

    def box(self, name: str) -> Box | None:
        labels = self.labels[name]
        return box_of(labels, self.gone) if isinstance(labels, Tensor) else None

    def _is_touched(self, node: fx.Node) -> bool:
        values = [self.labels[node.name], *(self.labels[source.name] for source in node.all_input_nodes)]
        return any(bool(self.gone[narrowed(leaf)].any()) for leaf in _tensors(values))

    # -- numbers ------------------------------------------------------------------------------------------

    def _keep_number(self, node: fx.Node) -> None:
        """A size of what is cut stays the number that it was: arithmetic on it may be no count of channels."""
        if not any(self._is_cut(source, node) for source in node.all_input_nodes):
            return
        value = record_of(node).spec
        if not isinstance(value, (int, float)):
            if value is not None and node.users:
                raise CannotRewrite(self.mode, node.name)
            return
        for user in list(node.users):
            user.args = fx.map_arg(user.args, lambda item: value if item is node else item)
            user.kwargs = fx.map_arg(user.kwargs, lambda item: value if item is node else item)
        node.graph.erase_node(node)

    def _is_cut(self, source: fx.Node, reader: fx.Node) -> bool:
        labels = self.labels[source.name]
        if not isinstance(labels, Tensor):
            return False
        box = box_of(labels, self.gone)
        if box is None:
            return True
        if reader.op == "call_method" and reader.target == "size" and len(reader.args) == 2:
            return box[reader.args[1]] is not None
        plain = reader.op == "call_method" and reader.target in ("dim", "is_floating_point", "is_contiguous")
        plain = plain or (reader.target is getattr and reader.args[1] not in ("shape",))
        return not plain and any(kept is not None for kept in box)

    # -- operations ---------------------------------------------------------------------------------------

    def _rewrite(self, node: fx.Node) -> None:
        rule = channel_rule(self.model, node)
        if operation_name(node) == "getitem" and not isinstance(self.labels[node.args[0].name], Tensor):
            return  # one of several results
        if rule is None:
            raise CannotRewrite(self.mode, node.name)
        if is_moved(self.model, node):
            self._move(node)
        elif any(box_of(leaf, self.gone) is None for leaf in _tensors(self.labels[node.name])):
            raise CannotRewrite(self.mode, node.name)
        elif rule.kind == "weighted":
            self._set_groups(node)
        elif rule.kind in NORMS:
            self._widen_norm(node, rule.kind)

    def _widen_norm(self, node: fx.Node, kind: str) -> None:
        """A norm that mixes channels keeps its width; of a GroupNorm with a group a channel, nothing has to be done."""
        old = self.old[node.name]
        source = operand(old, 0, "input")
        labels, box = self.labels[source.name], self.box(source.name)
        names = {self.labelled.space.couplings.get(int(label), ()) for label in labels.unique()}
        if not any(node.name in nodes for nodes in names):
            return
        indices: dict[str, Tensor] = {}
        if box is None or not pad_norm(node, self.model, kind, labels, box, indices):
            raise CannotRewrite(self.mode, node.name)
        self.result.indices |= indices

    def _set_groups(self, node: fx.Node) -> None:
        """A depthwise convolution has as many groups as channels are left."""
        operation = WEIGHTED[node.target]
        groups = operand(node, 6, "groups") if operation.kernel_rank else None
        if not groups or groups == 1:
            return
        input = operand(node, 0, "input")
        channel = len(self.labels[node.name].shape) - operation.kernel_rank - 1
        box = self.box(input.name)
        kept = box[channel] if box is not None else None
        if kept is None or groups != self.labels[input.name].shape[channel]:
            return
        if len(node.args) > 6:
            node.args = (*node.args[:6], len(kept), *node.args[7:])
        else:
            node.kwargs = {**node.kwargs, "groups": len(kept)}
        weight = operand(node, operation.weight, "weight")
        self.result.groups[str(weight.target)] = len(kept)

    def _move(self, node: fx.Node) -> None:
        old = self.old[node.name]
        results = _tensors(self.labels[node.name])
        boxes = [box_of(leaf, self.gone) for leaf in results]
        if any(box is None for box in boxes):
            return  # not computed itself: what uses it gathers
        operands = _tensors([self.labels[source.name] for source in old.all_input_nodes])
        if all(box_of(leaf, self.gone) is not None for leaf in operands):
            arguments = new_arguments(self, old, [box for box in boxes if box is not None])
            if arguments is not None and self._gives_the_same(old, *arguments):
                target, args, kwargs = arguments
                if target is not old.target:
                    node.op, node.target = "call_function", target
                names = {item.name: item for item in node.graph.nodes}
                node.args, node.kwargs = fx.map_arg((args, kwargs), lambda item: names[item.name])
                return
        self._gather(node, old, boxes)

    def _gather(self, node: fx.Node, old: fx.Node, boxes: list[Box | None]) -> None:
        found = gather_of(self.labelled, self.mode, old)
        if found is None or not isinstance(self.labels[node.name], Tensor):
            raise CannotRewrite(self.mode, node.name)
        source, dim, index = found
        source_box, box = self.box(source.name), boxes[0]
        if source_box is None or box is None:
            raise CannotRewrite(self.mode, node.name)
        length = self.labels[source.name].shape[dim]
        kept = source_box[dim] if source_box[dim] is not None else torch.arange(length)
        position = torch.full((length,), -1)
        position[kept] = torch.arange(len(kept))
        own = box[dim]
        index = position[index if own is None else index[own]]
        if bool((index < 0).any()):
            raise CannotRewrite(self.mode, node.name)
        name = f"_kept_{self.mode}_{node.name}"
        self.result.indices[name] = index
        graph = node.graph
        sources = {item.name: item for item in graph.nodes}
        with graph.inserting_before(node):
            constant = graph.create_node("get_attr", name)
        node.op, node.target = "call_function", torch.index_select
        node.args, node.kwargs = (sources[source.name], dim, constant), {}

    def _cut_number(self, number: Tensor, labels: Any) -> Tensor:
        box = box_of(labels, self.gone) if isinstance(labels, Tensor) else None
        return cut(number, box) if box is not None else number

    def _gives_the_same(self, old: fx.Node, target: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Executes a movement on element numbers, in full and cut, and compares."""
        numbers: dict[fx.Node, Any] = {}
        small: dict[fx.Node, Any] = {}
        first = 0

        def numbered(labels: Any) -> Any:
            nonlocal first
            if isinstance(labels, TensorReference):
                return labels.tensor.detach().cpu()  # an integer buffer that is an index
            first += labels.numel()
            return torch.arange(first - labels.numel(), first).reshape(labels.shape)

        for source in old.all_input_nodes:
            labels = self.labels[source.name]
            if _tensors(labels) or isinstance(labels, TensorReference):
                numbers[source] = pytree.tree_map(numbered, labels)
                small[source] = pytree.tree_map(self._cut_number, numbers[source], labels)
            else:
                numbers[source] = small[source] = record_of(source).spec
        full_args, full_kwargs = fx.map_arg((old.args, old.kwargs), lambda item: numbers[item])
        full = _tensors(execute(self.model, old, full_args, full_kwargs))
        new_args, new_kwargs = fx.map_arg((args, kwargs), lambda item: small[item])
        try:
            if target is old.target:
                result = execute(self.model, old, new_args, new_kwargs)
            else:
                result = target(*new_args, **new_kwargs)
        except RuntimeError:
            return False
        boxes = [box_of(leaf, self.gone) for leaf in _tensors(self.labels[old.name])]
        pairs = zip(full, _tensors(result), boxes, strict=True)
        return all(box is not None and torch.equal(cut(whole, box), part) for whole, part, box in pairs)


def _drop_unused_movements(model: Any, graph: fx.Graph) -> None:
    """What was between the two ends of a gather."""
    for node in reversed(list(graph.nodes)):
        if node.op.startswith("call") and not node.users and node.op != "call_module" and is_moved(model, node):
            graph.erase_node(node)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
