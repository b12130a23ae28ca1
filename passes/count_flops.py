"""Counts the multiply-accumulates of every node of a graph, without running the model.

A weighted operation costs its weight's elements times their reuse; with `active` counts, only the active
elements. Contractions without a weight (attention), and what a module hides (GRU, MultiheadAttention), are
counted from the ATen operations they consist of.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fxsparse.capture.fake_interpreter import FakeInterpreter
from fxsparse.core.graphs import operand, operation_name
from fxsparse.core.masking import apply_mask
from fxsparse.core.operations import UNCOUNTED, WEIGHTED, attention_macs
from fxsparse.core.records import record_of


@dataclass(frozen=True)
class NodeCost:
    """What one node costs for the example.

    Attributes:
        node, module, operation: where it is and what it calls.
        macs: multiply-accumulates with all weights.
        sparse_macs: the same with the active weights only.
        unknown: ATen operations in it that no rule covers.
    """

    node: str
    module: str
    operation: str
    macs: int
    sparse_macs: int
    unknown: tuple[str, ...] = ()


def count_flops(
    root: nn.Module, graph: fx.Graph, example: tuple[tuple, dict[str, Any]], active: Mapping[str, int]
) -> list[NodeCost]:
    """The cost of every node that has one, or that holds an operation without a rule.

    Args:
        root: what the graph's attributes and submodules refer to.
        example: arguments, with a `TensorSpec` in place of every tensor.
        active: parameter name -> number of active weights; parameters that are not in it are dense.
    """
    counter = _Counter(root, graph, active)
    counter.run_example(example)
    return counter.costs


class _Counter(FakeInterpreter):
    def __init__(self, root: nn.Module, graph: fx.Graph, active: Mapping[str, int]) -> None:
        super().__init__(root, graph)
        self.active = active
        self.costs: list[NodeCost] = []

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_function", "call_method", "call_module") or n.target is apply_mask:
            return super().run_node(n)
        with _AtenCosts() as aten:
            value = super().run_node(n)
        if n.op == "call_function" and n.target in WEIGHTED:
            macs, sparse_macs = self._weighted(n, value)
            self._add(n, macs, sparse_macs, ())
        elif aten.macs or aten.unknown:
            self._add(n, aten.macs, aten.macs, tuple(sorted(aten.unknown)))
        return value

    def _weighted(self, node: fx.Node, value: torch.Tensor) -> tuple[int, int]:
        operation = WEIGHTED[node.target]
        weight = operand(node, operation.weight, "weight")
        shape = tuple(self.env[weight].shape)
        reuse = operation.reuse(tuple(self.env[operand(node, 0, "input")].shape), shape, tuple(value.shape))
        elements = torch.Size(shape).numel()
        return elements * reuse, self.active.get(_parameter_behind(weight), elements) * reuse

    def _add(self, node: fx.Node, macs: int, sparse_macs: int, unknown: tuple[str, ...]) -> None:
        operation = WEIGHTED[node.target].name if node.target in WEIGHTED else operation_name(node)
        self.costs.append(NodeCost(node.name, record_of(node).module, operation, macs, sparse_macs, unknown))


def _parameter_behind(weight: fx.Node) -> str:
    """Name of the parameter whose elements a weight operand holds, through its mask and rearrangements."""
    while weight.target is apply_mask or operation_name(weight) in REARRANGEMENTS or _reads_transpose(weight):
        weight = weight.args[0]
    return str(weight.target)


def _reads_transpose(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] in ("T", "mT")


class _AtenCosts(TorchDispatchMode):
    """Adds up the MACs of the ATen operations that run inside it, and names those without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        name = packet.__name__
        if name in ATTENTION:
            self.macs += attention_macs(*(tuple(tensor.shape) for tensor in args[:3]))
        elif packet in flop_registry:
            self.macs += flop_registry[packet](*args, **kwargs, out_val=result) // 2
        elif func.namespace not in ("prim", "prims") and not (func.namespace == "aten" and _is_uncounted(func)):
            self.unknown.add(str(packet))
        return result


def _is_uncounted(func: torch._ops.OpOverload) -> bool:
    """Whether an ATen operation is outside the convention: a view, pointwise, or on the list; in place or not."""
    name = func._overloadpacket.__name__
    if name in UNCOUNTED or func.is_view or torch.Tag.pointwise in func.tags:
        return True
    plain = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    return plain is not None and any(_is_uncounted(getattr(plain, overload)) for overload in plain.overloads())


REARRANGEMENTS = frozenset(["t", "transpose", "permute", "view", "reshape", "flatten", "contiguous", "to", "clone"])
"""Operations whose result has the elements of their first argument, in another order or shape."""

ATTENTION = frozenset(
    [
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    ]
)
