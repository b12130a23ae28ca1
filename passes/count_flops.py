"""Counts what every node of a shape-annotated graph costs, without running the model.

A weighted operation (`core/operations.py`) costs its weight's elements times their reuse, or with `active`
counts the active elements times their reuse. Every other node is opened: it runs once on fake tensors of the
annotated shapes, and the torch functions and ATen operations that it consists of are added up
(`core/function_costs.py`, `core/aten_costs.py`). What a GRU, a MultiheadAttention or a wrapped function hides
is seen this way. Nodes that call the same thing on the same shapes are opened once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxsparse.capture.fake_values import FakeEvaluator
from fxsparse.capture.meta_values import MetaEvaluator, is_on_meta
from fxsparse.core.arguments import check_argument
from fxsparse.core.errors import InputError
from fxsparse.core.graphs import attribute, operand, operation_name
from fxsparse.core.masking import apply_mask
from fxsparse.core.node_cost import NodeCost
from fxsparse.core.operations import FUSED, WEIGHTED
from fxsparse.core.records import TensorSpec, record_of
from fxsparse.core.weight_operands import WeightOperand, einsum_share, input_dependent, shape_of, weight_operands
from fxsparse.core.weight_origin import Origin, origins_of, parameters_behind

from .count_parts import active_in_part
from .open_node import Opened, open_call

Shape = tuple[int, ...]


def count_flops(
    root: nn.Module, graph: fx.Graph, active: Mapping[str, int], *, training: bool = False
) -> list[NodeCost]:
    """The cost of every node that has one, or that holds an operation without a rule.

    Args:
        root: what the graph's attributes and submodules refer to.
        graph: annotated with shapes (`annotate_shapes`).
        active: parameter name -> number of active weights; parameters that are not in it are dense.
        training: whether submodules count as in train mode (dropout, batch statistics).

    Raises:
        InputError: a node without annotated shapes, or one that fails for them.
    """
    counter = _Counter(root, graph, active, training)
    modes = {module: module.training for module in root.modules() if module is not root}
    try:
        for module in modes:
            module.training = training
        for node in graph.nodes:
            counter.visit(node)
    finally:
        for module, flag in modes.items():
            module.training = flag
    return counter.costs


class _Counter:
    def __init__(self, root: nn.Module, graph: fx.Graph, active: Mapping[str, int], training: bool) -> None:
        self.root = root
        self._from_input = input_dependent(graph)
        self.active = active
        self.costs: list[NodeCost] = []
        self._evaluator = FakeEvaluator(root)
        self._quick = MetaEvaluator(root) if is_on_meta(root) and not training else None
        self._trained: dict[fx.Node, bool] = {}
        self._opened: dict[Any, Opened] = {}

    def visit(self, node: fx.Node) -> None:
        self._trained[node] = self._is_trained(node)
        if node.op not in ("call_function", "call_method", "call_module") or node.target in (
            apply_mask,
            check_argument,
        ):
            return
        operands = weight_operands(node, self._from_input)
        costs = self._weighted(node, operands) if node.target in WEIGHTED else self._other(node, operands)
        self.costs.extend(cost for cost in costs if cost.macs or cost.unknown or any(cost.other.values()))

    # -- the two kinds of nodes ---------------------------------------------------------------------------

    def _weighted(self, node: fx.Node, operands: Sequence[WeightOperand]) -> list[NodeCost]:
        """A convolution or linear, whose weight is used equally often everywhere."""
        operation = WEIGHTED[node.target]
        input, weight = operand(node, 0, "input"), operand(node, operation.weight, "weight")
        bias = operand(node, operation.bias, "bias")
        shapes = [_shape_of(value, node) for value in (input, weight, node)]
        reuse, elements = operation.reuse(*shapes), prod(shapes[1])
        whole = NodeCost(
            node=node.name,
            module=record_of(node).module,
            operation=operation.name,
            macs=elements * reuse,
            weight_shape=shapes[1],
            input_shape=shapes[0],
            output_shape=shapes[2],
            stride=_stride(node, operation.kernel_rank),
            elements=elements,
            active=elements,
            parameters=self._parameters(node),
            other={"bias": prod(shapes[2])} if bias is not None else {},
            input_gradient=elements * reuse if self._trained.get(input, False) else 0,
            weight_gradient=elements * reuse if self._trained.get(weight, False) else 0,
        )
        return self._by_weight(whole, [(item, whole.macs) for item in operands])

    def _other(self, node: fx.Node, operands: Sequence[WeightOperand]) -> list[NodeCost]:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: _spec_of(source, node))
        result = _spec_of(node, node)
        if not _tensors(args) and not _tensors(kwargs) and not _tensors(result):
            return []  # arithmetic on sizes
        if record_of(node).opaque:  # its units are counted by count_units, its own arithmetic by nobody
            opened = Opened(unknown=(f"{self._title(node)} itself, kept as one call",))
        elif node.target is torch.autograd.grad:  # by itself it has no graph to go back through
            opened = Opened(unknown=("the backward pass that forward runs",))
        else:
            opened = self._open(node, args, kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        shares = [(item, _share(node, item, opened.macs)) for item in operands]
        trained = [macs for item, macs in shares if self._trained.get(item.node, False)]
        to_weight = min(sum(trained), opened.backward)
        whole = NodeCost(
            node=node.name,
            module=str(node.target) if node.op == "call_module" else record_of(node).module,
            operation=self._title(node),
            macs=opened.macs,
            input_shape=inputs[0].shape if inputs else None,
            output_shape=outputs[0].shape if outputs else None,
            parameters=self._parameters(node),
            other=opened.other,
            input_gradient=opened.backward - to_weight,
            weight_gradient=to_weight,
            unknown=opened.unknown,
            detail=opened.detail,
        )
        return self._by_weight(whole, shares)

    def _by_weight(self, whole: NodeCost, shares: Sequence[tuple[WeightOperand, int]]) -> list[NodeCost]:
        """A node's cost by the parameters that its weights come from; what is left stays with the node itself."""
        parts = [(item, origin, macs) for item, macs in shares for origin in self._origins(item)]
        parts = [(item, origin, macs * origin.elements // _covered(self.root, item)) for item, origin, macs in parts]
        if not parts or sum(macs for _, _, macs in parts) > whole.macs:
            return [whole]
        costs = []
        left = whole
        for item, origin, macs in parts:
            size = attribute(self.root, origin.name).numel()
            part = replace(
                whole,
                node=whole.node if len(parts) == 1 and macs == whole.macs else f"{whole.node}:{origin.name}",
                call=whole.node,
                macs=macs,
                weight=origin.name if origin.keeps_zeros else None,
                weight_shape=shape_of(item.node),
                elements=origin.elements,
                active=origin.elements,
                size=size,
                parameters=size,
                other={},
                input_gradient=whole.input_gradient * macs // whole.macs if whole.macs else 0,
                weight_gradient=macs if whole.weight_gradient and self._trained.get(item.node, False) else 0,
                unknown=(),
                detail="" if origin.keeps_zeros else f"zeros of {origin.name} are none after {origin.computed}",
            )
            costs.append(replace(part, active=self._active(item, part)))
            left = replace(
                left,
                macs=left.macs - part.macs,
                input_gradient=left.input_gradient - part.input_gradient,
                weight_gradient=left.weight_gradient - part.weight_gradient,
                parameters=max(left.parameters - size, 0),
            )
        if left.macs:
            return [*costs, replace(left, weight_shape=None, elements=0, active=0)]
        first = costs[0]
        costs[0] = replace(
            first,
            other=whole.other,
            unknown=whole.unknown,
            detail=first.detail or whole.detail,
            parameters=first.parameters + left.parameters,
            input_gradient=first.input_gradient + left.input_gradient,
            weight_gradient=first.weight_gradient + left.weight_gradient,
        )
        return costs

    def _active(self, item: WeightOperand, part: NodeCost) -> int:
        """Active elements of a weight: of a part, by the mask where that is at hand."""
        if part.weight in self.active and part.elements < part.size == self.root.get_parameter(part.weight).numel():
            exact = active_in_part(self.root, item.node, self.active[part.weight])
            if exact is not None and part.elements == prod(part.weight_shape or ()):
                return exact
        return part.active_among(self.active)

    def _origins(self, item: WeightOperand) -> list[Origin]:
        origins = origins_of(self.root, item.node)
        return [] if isinstance(origins, str) else origins

    # -- opening a node -----------------------------------------------------------------------------------

    def _open(self, node: fx.Node, args: tuple, kwargs: dict) -> Opened:
        trained = tuple(self._trained.get(source, False) for source in node.all_input_nodes)
        key = _key(self.root, node, args, kwargs, trained)
        if key is None or key not in self._opened:
            flags = [
                self._trained.get(source, False)
                for source in _operands((node.args, node.kwargs))
                for _ in _tensors(_spec_of(source, node))
            ]
            opened = self._open_quickly(node, args, kwargs, flags)
            if opened is None:
                try:
                    opened = open_call(self._evaluator, node.op, node.target, args, kwargs, flags)
                except Exception as error:
                    raise InputError(_failure(node, args, error)) from error
            if key is None:
                return opened
            self._opened[key] = opened
        return self._opened[key]

    def _open_quickly(self, node: fx.Node, args: tuple, kwargs: dict, flags: list[bool]) -> Opened | None:
        """On plain meta tensors, where everything is on that device; None where that does not do."""
        if self._quick is None or any(spec.device.type != "meta" for spec in _tensors((args, kwargs))):
            return None
        try:
            return open_call(self._quick, node.op, node.target, args, kwargs, flags)
        except Exception:  # the fake tensors then say what is wrong, or do it
            return None

    # -- what is known of a node --------------------------------------------------------------------------

    def _is_trained(self, node: fx.Node) -> bool:
        """Whether a gradient flows to the value of this node."""
        if node.op == "placeholder":
            return False
        if node.op == "get_attr":
            value = attribute(self.root, str(node.target))
            return isinstance(value, Tensor) and value.requires_grad
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            if any(parameter.requires_grad for parameter in module.parameters()):
                return True
        if operation_name(node) in ("detach", "detach_"):
            return False
        spec = record_of(node).spec
        if spec is not None and not _tensors(spec):
            return False  # a size, a dtype, a device
        if isinstance(spec, TensorSpec) and not (spec.dtype.is_floating_point or spec.dtype.is_complex):
            return False
        return any(self._trained.get(source, False) for source in node.all_input_nodes)

    def _parameters(self, node: fx.Node) -> int:
        if node.op == "call_module":
            return sum(parameter.numel() for parameter in self.root.get_submodule(str(node.target)).parameters())
        made = [source for source in node.all_input_nodes if source not in self._from_input]
        found = {id(own): own for source in made for own in parameters_behind(self.root, source).values()}
        return sum(parameter.numel() for parameter in found.values())

    def _title(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self.root.get_submodule(str(node.target))).__name__
        if record_of(node).opaque:
            return type(self.root).__name__
        return operation_name(node)


def _share(node: fx.Node, item: WeightOperand, macs: int) -> int:
    """How many of a node's MACs multiply with one of its weights."""
    if node.target in FUSED:
        rows = prod(_shape_of(node.args[0] if node.args else node.kwargs["input"], node)[:-1])
        return rows * prod(shape_of(item.node))
    return einsum_share(node, item.node) if item.operation == "einsum" else macs


def _covered(root: nn.Module, item: WeightOperand) -> int:
    """Elements of parameters in a weight: its own, without the repetitions of `expand`."""
    origins = origins_of(root, item.node)
    return prod(shape_of(item.node)) if isinstance(origins, str) else sum(origin.elements for origin in origins)


def _operands(tree: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(tree, lambda node: found.append(node) or node)
    return found


def _spec_of(source: fx.Node, user: fx.Node) -> Any:
    spec = record_of(source).spec
    if spec is None and source.op == "placeholder":
        return None
    if spec is None and source is not user and source.op != "call_function":
        raise InputError(f"node {source.name} has no shape annotated, which {user.name} needs; run annotate_shapes")
    return spec


def _shape_of(source: Any, user: fx.Node) -> Shape:
    spec = _spec_of(source, user) if isinstance(source, fx.Node) else TensorSpec.of(source)
    if not isinstance(spec, TensorSpec):
        raise InputError(f"node {user.name} has an operand without an annotated shape; run annotate_shapes")
    return spec.shape


def _stride(node: fx.Node, kernel_rank: int) -> Shape:
    if not kernel_rank:
        return ()
    stride = operand(node, 3, "stride") or 1
    return (stride,) * kernel_rank if isinstance(stride, int) else tuple(stride)


def _tensors(tree: Any) -> list[TensorSpec]:
    leaves = pytree.tree_leaves(tree, is_leaf=lambda leaf: isinstance(leaf, TensorSpec))
    return [leaf for leaf in leaves if isinstance(leaf, TensorSpec)]


def _key(root: nn.Module, node: fx.Node, args: tuple, kwargs: dict, trained: tuple[bool, ...]) -> Any:
    """What a node's cost depends on, or None where that is not known to be comparable."""
    target: Any = node.target
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if not type(module).__module__.startswith(("torch.nn.modules.", "torchvision.ops.")):
            return None
        tensors = (*module.parameters(), *module.buffers())
        target = (type(module), repr(module), module.training, tuple((t.shape, t.requires_grad) for t in tensors))
    key = (node.op, target, _frozen(args), _frozen(kwargs), trained)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _frozen(tree: Any) -> Any:
    if isinstance(tree, tuple | list):
        return tuple(_frozen(item) for item in tree)
    if isinstance(tree, dict):
        return tuple((key, _frozen(value)) for key, value in tree.items())
    if isinstance(tree, slice):
        return ("slice", tree.start, tree.stop, tree.step)
    return tree


def _failure(node: fx.Node, args: Any, error: Exception) -> str:
    shapes = ", ".join(str(spec.shape) for spec in _tensors(args))
    place = f" in {record_of(node).module}" if record_of(node).module else ""
    reason = str(error).strip().split("\n")[0]
    return f"node {node.name}{place} fails for inputs of shape {shapes or 'none'}: {reason}"
