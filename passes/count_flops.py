"""Counts what every node of a shape-annotated graph costs, without running the model.

A weighted operation (`core/operations.py`) costs its weight's elements times their reuse, or with `active`
counts the active elements times their reuse. Every other node is opened: it runs once on fake tensors of the
annotated shapes, and the torch functions and ATen operations that it consists of are added up
(`core/function_costs.py`, `core/aten_costs.py`). What a GRU, a MultiheadAttention or a wrapped function hides
is seen this way. Nodes that call the same thing on the same shapes are opened once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxsparse.capture.fake_values import FakeEvaluator
from fxsparse.capture.meta_values import MetaEvaluator, is_on_meta
from fxsparse.core.arguments import check_argument
from fxsparse.core.errors import InputError
from fxsparse.core.graphs import attribute, operand, operation_name
from fxsparse.core.masking import apply_mask
from fxsparse.core.operations import WEIGHTED
from fxsparse.core.records import TensorSpec, record_of

from .open_node import Opened, open_call

Shape = tuple[int, ...]


@dataclass(frozen=True)
class NodeCost:
    """What one node costs for the example.

    Attributes:
        node, module, operation: its name, the submodule that makes the call, and what it calls.
        macs: multiply-accumulates with all weights.
        weight: name of the parameter whose elements are the weight, if there is one.
        weight_shape, input_shape, output_shape: of the weight, the first tensor argument, the first result.
        stride: of a convolution, per dimension.
        elements, active: number of weight elements, and of those that are active; 0 without a weight.
        parameters: number of parameters that the node reads.
        other: FLOPs that are not MACs, by category (`core/aten_costs.py`).
        input_gradient: MACs of the gradients of the inputs, with all weights; 0 where nothing before the node
            is trained.
        weight_gradient: MACs of the gradient of the weight, at all positions; 0 where it is not trained.
        unknown: operations in the node that no rule covers.
        detail: what a reader should know of how it was counted.
    """

    node: str
    module: str
    operation: str
    macs: int = 0
    weight: str | None = None
    weight_shape: Shape | None = None
    input_shape: Shape | None = None
    output_shape: Shape | None = None
    stride: Shape = ()
    elements: int = 0
    active: int = 0
    parameters: int = 0
    other: Mapping[str, int] = field(default_factory=dict)
    input_gradient: int = 0
    weight_gradient: int = 0
    unknown: tuple[str, ...] = ()
    detail: str = ""

    @property
    def density(self) -> float:
        """Fraction of the weight's elements that are active; 1 without a weight."""
        return self.active / self.elements if self.elements else 1.0

    @property
    def sparse_macs(self) -> int:
        """Multiply-accumulates with the active weights only."""
        return self._of_active(self.macs)

    @property
    def backward(self) -> int:
        """MACs of the backward pass with all weights."""
        return self.input_gradient + self.weight_gradient

    @property
    def sparse_backward(self) -> int:
        """MACs of the backward pass with the active weights only."""
        return self._of_active(self.input_gradient) + self._of_active(self.weight_gradient)

    @property
    def dense_gradient_backward(self) -> int:
        """MACs of a backward pass with the active weights that gives the gradient of all weights."""
        return self._of_active(self.input_gradient) + self.weight_gradient

    def _of_active(self, macs: int) -> int:
        """Every element of a weight is used equally often."""
        return macs // self.elements * self.active if self.elements else macs


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
    counter = _Counter(root, active, training)
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
    def __init__(self, root: nn.Module, active: Mapping[str, int], training: bool) -> None:
        self.root = root
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
        if node.op == "call_function" and node.target in WEIGHTED:
            cost = self._weighted(node)
        else:
            cost = self._other(node)
        if cost is not None and (cost.macs or cost.unknown or any(cost.other.values())):
            self.costs.append(cost)

    # -- the two kinds of nodes ---------------------------------------------------------------------------

    def _weighted(self, node: fx.Node) -> NodeCost:
        operation = WEIGHTED[node.target]
        input, weight = operand(node, 0, "input"), operand(node, operation.weight, "weight")
        bias = operand(node, operation.bias, "bias")
        shapes = [_shape_of(value, node) for value in (input, weight, node)]
        reuse, elements = operation.reuse(*shapes), prod(shapes[1])
        name = parameter_behind(weight)
        active = self.active.get(name, elements) if name else elements
        return NodeCost(
            node=node.name,
            module=record_of(node).module,
            operation=operation.name,
            macs=elements * reuse,
            weight=name,
            weight_shape=shapes[1],
            input_shape=shapes[0],
            output_shape=shapes[2],
            stride=_stride(node, operation.kernel_rank),
            elements=elements,
            active=active,
            parameters=self._parameters(node),
            other={"bias": prod(shapes[2])} if bias is not None else {},
            input_gradient=elements * reuse if self._trained.get(input, False) else 0,
            weight_gradient=elements * reuse if self._trained.get(weight, False) else 0,
        )

    def _other(self, node: fx.Node) -> NodeCost | None:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: _spec_of(source, node))
        result = _spec_of(node, node)
        if not _tensors(args) and not _tensors(kwargs) and not _tensors(result):
            return None  # arithmetic on sizes
        opened = self._open(node, args, kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        name, elements, active = self._masked_factor(node, opened.macs)
        to_weight = opened.macs if name is not None and opened.backward >= opened.macs else 0
        return NodeCost(
            node=node.name,
            module=str(node.target) if node.op == "call_module" else record_of(node).module,
            operation=self._title(node),
            macs=opened.macs,
            weight=name,
            weight_shape=_weight_shape(node, name),
            input_shape=inputs[0].shape if inputs else None,
            output_shape=outputs[0].shape if outputs else None,
            elements=elements,
            active=active,
            parameters=self._parameters(node),
            other=opened.other,
            input_gradient=opened.backward - to_weight,
            weight_gradient=to_weight,
            unknown=opened.unknown,
            detail=opened.detail,
        )

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

    def _masked_factor(self, node: fx.Node, macs: int) -> tuple[str | None, int, int]:
        """Name, size and active count of a masked weight that enters a matrix product as one factor."""
        if not macs or operation_name(node) not in MATRIX_PRODUCTS:
            return None, 0, 0
        for source in node.all_input_nodes:
            name = parameter_behind(source)
            if name in self.active:
                elements = prod(_shape_of(source, node))
                if elements and macs % elements == 0:
                    return name, elements, self.active[name]
        return None, 0, 0

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
        if isinstance(spec, TensorSpec) and not (spec.dtype.is_floating_point or spec.dtype.is_complex):
            return False
        return any(self._trained.get(source, False) for source in node.all_input_nodes)

    def _parameters(self, node: fx.Node) -> int:
        if node.op == "call_module":
            return sum(parameter.numel() for parameter in self.root.get_submodule(str(node.target)).parameters())
        names = {parameter_behind(source) for source in node.all_input_nodes} - {None}
        values = [attribute(self.root, str(name)) for name in names]
        return sum(value.numel() for value in values if isinstance(value, nn.Parameter))

    def _title(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self.root.get_submodule(str(node.target))).__name__
        return operation_name(node)


REARRANGEMENTS = frozenset(["t", "transpose", "permute", "view", "reshape", "flatten", "contiguous", "to", "clone"])
"""Operations whose result has the elements of their first argument, in another order or shape."""

MATRIX_PRODUCTS = frozenset(["matmul", "mm", "bmm", "mv", "__matmul__", "__rmatmul__", "addmm", "addmv", "baddbmm"])


def parameter_behind(weight: Any) -> str | None:
    """Name of the parameter whose elements an operand holds, through its mask and rearrangements."""
    while isinstance(weight, fx.Node) and weight.op != "get_attr":
        reads_transpose = weight.target is getattr and weight.args[1] in ("T", "mT")
        if weight.target is not apply_mask and operation_name(weight) not in REARRANGEMENTS and not reads_transpose:
            return None
        weight = weight.args[0]
    return str(weight.target) if isinstance(weight, fx.Node) else None


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


def _weight_shape(node: fx.Node, name: str | None) -> Shape | None:
    if name is None:
        return None
    return next(_shape_of(source, node) for source in node.all_input_nodes if parameter_behind(source) == name)


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
