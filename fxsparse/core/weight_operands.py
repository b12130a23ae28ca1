"""Which arguments of a node are weights: a parameter, or what is made of parameters, that an input is multiplied with.

The rule, for every operation of `core/operations.py`: a weighted or recurrent operation takes its weights at its own
places. A product (`matmul`, `bmm`, `addmm`, `einsum`) takes either factor as a weight where that one does not depend
on the input of the model and the other one does. Which parameter stands behind a weight says `core/weight_origin.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .function_costs import einsum_steps, parse_einsum
from .graphs import has_effect, operand, operation_name
from .operations import FUSED, PRODUCTS, RANDOM, WEIGHTED
from .records import TensorSpec, record_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WeightOperand:
    """One weight among the arguments of a node.

    Attributes:
        node: the argument.
        operation: name of the operation, for reports.
        matrix: `(out, in, *kernel)` of one matrix of the argument; a batch of matrices has several.
        groups: of a convolution.
        output_axis: of `node`'s value, the axis over output channels (of several the last); None where there is none.
        input_axis: the same of the axis over input channels, which is summed over.
    """

    node: fx.Node
    operation: str
    matrix: Shape
    groups: int = 1
    output_axis: int | None = 0
    input_axis: int | None = 1


def weight_operands(node: fx.Node, from_input: frozenset[fx.Node]) -> list[WeightOperand]:
    """The weights among the arguments of a node of a graph that is annotated with shapes.

    Args:
        from_input: the nodes of the graph that depend on its input (`input_dependent`).
    """
    if node.op not in ("call_function", "call_method"):
        return []
    found = [item for item in _operands(node, from_input) if item.node not in from_input]
    return [item for item in found if len(shape_of(item.node)) >= 2]


def _operands(node: fx.Node, from_input: frozenset[fx.Node]) -> Iterator[WeightOperand]:
    if node.target in WEIGHTED:
        operation = WEIGHTED[node.target]
        weight = operand(node, operation.weight, "weight")
        groups = operand(node, 6, "groups") if operation.kernel_rank else 1
        if isinstance(weight, fx.Node):
            groups = groups if isinstance(groups, int) else 1
            axis = 1 if operation.name.startswith("conv_transpose") else 0
            yield WeightOperand(weight, operation.name, shape_of(weight), groups, axis, 1 - axis)
    elif node.target in FUSED:
        for weight in FUSED[node.target].weights(node):
            if isinstance(weight, fx.Node):
                out, *rest = shape_of(weight) or (1,)
                yield WeightOperand(weight, FUSED[node.target].name, (out, prod(rest)))
    elif operation_name(node) == "einsum":
        yield from _einsum_operands(node, from_input)
    elif operation_name(node) in PRODUCTS:
        places = PRODUCTS[operation_name(node)]
        factors = [operand(node, place, name) for place, name in places]
        for index, factor in enumerate(factors):
            other = factors[1 - index]
            if isinstance(factor, fx.Node) and isinstance(other, fx.Node) and other in from_input:
                shape = shape_of(factor)
                if len(shape) >= 2:
                    matrix = shape[-2:] if index == 0 else shape[:-3:-1]
                    axis = -2 if index == 0 else -1
                    title = operation_name(node).strip("_")
                    yield WeightOperand(factor, title, matrix, output_axis=axis, input_axis=-3 - axis)


def _einsum_operands(node: fx.Node, from_input: frozenset[fx.Node]) -> Iterator[WeightOperand]:
    labels, output, factors = einsum_terms(node)
    terms = list(zip(labels, factors, strict=True))
    for index, (own, factor) in enumerate(terms):
        rest = terms[:index] + terms[index + 1 :]
        others = set().union(*(term for term, _ in rest))
        summed_before = set(own) - others - set(output)
        if not isinstance(factor, fx.Node) or summed_before or len(set(own)) < len(own):
            continue
        if any(other in from_input for _, other in rest):
            sizes = dict(zip(own, shape_of(factor), strict=True))
            taken = prod(size for label, size in sizes.items() if label not in output)
            given = prod(size for label, size in sizes.items() if label not in others)
            outputs = [axis for axis, label in enumerate(own) if label not in others]
            inputs = [axis for axis, label in enumerate(own) if label not in output]
            last_output, last_input = outputs[-1] if outputs else None, inputs[-1] if inputs else None
            yield WeightOperand(factor, "einsum", (given, taken), output_axis=last_output, input_axis=last_input)


def einsum_terms(node: fx.Node) -> tuple[list[list[Any]], list[Any], list[Any]]:
    """Labels of each operand of an einsum, of its result, and the operands (nodes)."""
    nodes: dict[int, fx.Node] = {}

    def stand_in(source: fx.Node) -> torch.Tensor:
        tensor = torch.empty(shape_of(source), device="meta")
        nodes[id(tensor)] = source
        kept.append(tensor)
        return tensor

    kept: list[torch.Tensor] = []
    try:
        labels, output, operands = parse_einsum(fx.map_arg(node.args, stand_in))
    except (TypeError, ValueError, IndexError, AttributeError):
        return [], [], []
    return labels, output, [nodes.get(id(tensor)) for tensor in operands]


def einsum_share(node: fx.Node, weight: fx.Node) -> int:
    """MACs of the step of an einsum that takes a weight as it is; the other steps multiply what comes of it."""
    labels, output, factors = einsum_terms(node)
    index = factors.index(weight)
    steps = einsum_steps(labels, output, [shape_of(factor) for factor in factors])
    return next(macs for macs, taken in steps if index in taken)


def input_dependent(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes whose value depends on tensors of the input, or on random numbers.

    Sizes alone do not count, nor does which experts of a bank an input goes to.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_source = node.op == "placeholder" or operation_name(node).rstrip("_") in RANDOM
        sources = node.all_input_nodes[:1] if chooses_matrices(node) else node.all_input_nodes
        if is_source or (any(source in found for source in sources) and not is_number(node)):
            found.add(node)
            if has_effect(node) and node.args and isinstance(node.args[0], fx.Node):
                found.add(node.args[0])  # changed in place
    return frozenset(found)


def chooses_matrices(node: fx.Node) -> bool:
    """Whether a node takes whole matrices of a bank by a tensor of indices: `experts[index]`."""
    name = operation_name(node)
    if name not in ("getitem", "index_select") or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    bank, chosen = shape_of(node.args[0]), shape_of(node)
    index = node.args[1:2] if name == "getitem" else (node.kwargs.get("index", node.args[-1]),)
    by_tensor = any(isinstance(item, fx.Node) and isinstance(record_of(item).spec, TensorSpec) for item in index)
    return by_tensor and len(bank) >= 3 and len(chosen) >= 2 and chosen[-2:] == bank[-2:]


def shape_of(node: fx.Node) -> Shape:
    """The annotated shape of a node's value; empty where that is no tensor."""
    spec = record_of(node).spec
    return spec.shape if isinstance(spec, TensorSpec) else ()


def is_number(node: fx.Node) -> bool:
    """Whether a node's value is plain numbers, such as a size: no gradient comes through it."""
    spec = record_of(node).spec
    leaves = pytree.tree_leaves(spec, is_leaf=lambda leaf: isinstance(leaf, TensorSpec))
    return spec is not None and bool(leaves) and all(isinstance(leaf, (bool, int, float, str)) for leaf in leaves)
