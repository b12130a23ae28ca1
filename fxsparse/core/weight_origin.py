"""From a weight among a node's arguments back to the parameter that is masked: its origin.

A weight may be the parameter itself, seen otherwise (transposed, reshaped, expanded), a part of it (one of three
fused projections, one expert of a bank; those that a router chose count as the whole), a few of them joined, or
computed from it (weight normalisation, standardisation, any parametrization). Of a computed weight, the origin is the
one parameter with two or more dimensions and as many elements as the weight; where there is none, or several, there is
no origin.

A computed weight need not be zero where its parameter is: a standardised filter has its mean subtracted.
`keeps_zeros` says whether it is, by what is known of each operation on the way; of the others, it is not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree

from .graphs import attribute, operation_name
from .masking import apply_mask
from .records import record_of
from .weight_operands import chooses_matrices, is_number, shape_of


@dataclass(frozen=True)
class Origin:
    """Where a weight, or a part of one, comes from.

    Attributes:
        name: of the parameter, as the graph reads it.
        elements: how many of the parameter's elements are in the weight.
        size: how many elements the parameter has.
        computed: the operation that gives the weight, where it is computed; else empty.
        keeps_zeros: whether the weight is zero where the parameter is.
    """

    name: str
    elements: int
    size: int
    computed: str = ""
    keeps_zeros: bool = True

    @property
    def is_part(self) -> bool:
        return self.elements < self.size


def origins_of(root: nn.Module, weight: fx.Node) -> list[Origin] | str:
    """The origins of a weight, or in a few words why it has none; the graph is annotated with shapes.

    Several are those of the pieces of a weight that is joined (`cat`, `stack`); empty where no parameter of two or
    more dimensions takes part.
    """
    joined = _joined(root, weight, Fraction(1))
    if joined is not None:
        return joined
    elements = prod(shape_of(weight))
    behind = parameters_behind(root, weight)
    if behind and _is_indexed(weight):
        return "its rows are chosen by index"
    candidates = {name: own for name, own in behind.items() if own.ndim >= 2 and own.numel() == elements}
    if len(candidates) > 1:
        return f"{', '.join(sorted(candidates))} have as many elements as the weight"
    if not candidates:
        return "none of its parameters has as many elements as the weight" if behind else []
    ((name, parameter),) = candidates.items()
    keeps = _keeps_zeros(root, weight, name, {})
    return [Origin(name, elements, parameter.numel(), _title(root, weight), keeps)]


def _joined(root: nn.Module, node: Any, part: Fraction) -> list[Origin] | None:
    """Origins of a weight that is a parameter, a view of one, or joined from such; None where it is something else."""
    while isinstance(node, fx.Node) and node.op != "get_attr":
        if node.op not in ("call_function", "call_method"):
            return None
        name = operation_name(node)
        if node.op == "call_function" and name in JOINS and isinstance(node.args[0], (list, tuple)):
            pieces = [_joined(root, piece, part) for piece in node.args[0]]
            return None if None in pieces else [origin for piece in pieces for origin in piece or ()]
        if node.target is getattr:
            name = str(node.args[1])
        source = node.args[0] if node.args else None
        is_part = _is_part(node)
        is_whole = name in REARRANGEMENTS or node.target is apply_mask or chooses_matrices(node)
        if not isinstance(source, fx.Node) or not (is_part or is_whole):
            return None
        if is_part and shape_of(node):
            part *= Fraction(prod(shape_of(node)), _elements_before(source))
        node = source
    if not isinstance(node, fx.Node):
        return None
    parameter = _parameter(root, node)
    if parameter is None or parameter.ndim < 2:
        return None
    return [Origin(str(node.target), int(parameter.numel() * part), parameter.numel())]


def _is_part(node: fx.Node) -> bool:
    """Whether a node takes a part of its argument that does not depend on values: `w[2:4]`, not `w[index]`."""
    name = operation_name(node)
    if name == "getitem":
        index = pytree.tree_leaves(fx.map_arg(node.args[1], shape_or_number))
        return all(isinstance(leaf, (int, slice, type(None), type(...))) for leaf in index)
    return name in PARTS


def shape_or_number(node: fx.Node) -> Any:
    """Stands for a node in an index: a number where it is one."""
    return 0 if isinstance(record_of(node).spec, (int, type(None))) else record_of(node).spec


def _elements_before(source: fx.Node) -> int:
    """Elements of what a part is taken of; of a tuple of pieces (`chunk`), of what it was cut from."""
    while not shape_of(source):
        source = source.args[0]  # type: ignore[assignment]
    return prod(shape_of(source))


def parameters_behind(root: nn.Module, node: fx.Node) -> dict[str, nn.Parameter]:
    """The parameters from which a value is computed with a gradient, by the name under which the graph reads them."""
    found = {}
    for current in _made_of(node):
        parameter = _parameter(root, current)
        if parameter is not None:
            found[str(current.target)] = parameter
        if current.op == "call_module":
            inner = root.get_submodule(str(current.target)).named_parameters(prefix=str(current.target))
            found.update(inner)
    return found


def _made_of(node: fx.Node) -> Iterator[fx.Node]:
    """A node and all before it from which a gradient comes."""
    seen, open_nodes = {node}, [node]
    while open_nodes:
        current = open_nodes.pop()
        if _is_detached(current) or is_number(current):
            continue
        yield current
        fresh = [source for source in current.all_input_nodes if source not in seen]
        seen.update(fresh)
        open_nodes.extend(fresh)


def _is_indexed(weight: fx.Node) -> bool:
    """Whether elements are chosen by a tensor of indices on the way to a weight."""
    return any(
        operation_name(node) in INDEXING or (operation_name(node) == "getitem" and not _is_part(node))
        for node in _made_of(weight)
    )


def _is_detached(node: fx.Node) -> bool:
    name = str(node.args[1]) if node.target is getattr else operation_name(node)
    return name in ("detach", "detach_", "data")


def _parameter(root: nn.Module, node: fx.Node) -> nn.Parameter | None:
    value = attribute(root, str(node.target)) if node.op == "get_attr" else None
    return value if isinstance(value, nn.Parameter) else None


def _title(root: nn.Module, node: fx.Node) -> str:
    while operation_name(node) in REARRANGEMENTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if node.op != "call_module":
        return operation_name(node).strip("_")
    return type(root.get_submodule(str(node.target))).__name__.strip("_")


# -- zeros --------------------------------------------------------------------------------------------------


def _keeps_zeros(root: nn.Module, node: Any, name: str, known: dict[fx.Node, bool]) -> bool:
    """Whether a value has as many elements as the parameter `name`, and zeros where that one has them."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "get_attr":
        return str(node.target) == name
    if node not in known:
        known[node] = any(_keeps_zeros(root, source, name, known) for source in _zeros_from(root, node))
    return known[node]


def _zeros_from(root: nn.Module, node: fx.Node) -> list[Any]:
    """The arguments, where one of them being zero at a place makes the result zero at that place."""
    if node.op == "call_module":
        position = KEEPING_MODULES.get(type(root.get_submodule(str(node.target))))
        found = [] if position is None else list(node.args[position : position + 1])
    elif node.target is apply_mask:
        found = [node.args[0]]
    else:
        name = str(node.args[1]) if node.target is getattr else operation_name(node).strip("_")
        if name in ("mul", "multiply", "rmul"):
            found = list(node.args[:2])
        elif name in REARRANGEMENTS or name in KEEPING:
            found = list(node.args[:1])
        else:
            found = []
    size = prod(shape_of(node))
    return [item for item in found if isinstance(item, fx.Node) and prod(shape_of(item)) == size]


REARRANGEMENTS = frozenset(
    """t T mT transpose permute swapaxes swapdims movedim moveaxis view view_as reshape reshape_as flatten unflatten
    ravel squeeze unsqueeze contiguous clone to type type_as float double half bfloat16 cuda cpu expand expand_as
    broadcast_to""".split()
)
"""Operations whose result has the elements of their first argument, in another order, shape or precision."""

PARTS = frozenset("getitem narrow select chunk split split_with_sizes tensor_split unbind".split())
"""Operations whose result is a part of their first argument, or a tuple of parts."""

INDEXING = frozenset("index_select gather take take_along_dim masked_select embedding".split())

JOINS = frozenset("cat concat concatenate stack vstack hstack".split())

KEEPING = frozenset(
    """div truediv true_divide divide neg abs sign sqrt square relu tanh sin round normalize weight_norm
    spectral_weight""".split()
)
"""Operations whose result is zero where their first argument is. (`F.normalize` and `torch._weight_norm` divide.)"""

KEEPING_MODULES: dict[type[nn.Module], int] = {
    parametrizations._WeightNorm: 1,
    parametrizations._SpectralNorm: 0,
    nn.Identity: 0,
}
"""Parametrizations whose result is zero where this argument is."""
