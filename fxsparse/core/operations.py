"""What fxsparse knows of the operations that take a weight, a row an operation.

A row says where a weighted operation takes its weight and its bias, and how often one weight element is used
(its MACs). Recurrent functions take several weights; of a product, either factor may be one
(`core/weight_operands.py`). Contractions without a weight, and what modules hide, are counted from the ATen
operations that they consist of: `core/aten_costs.py`. An operation that is in no table is never guessed at: its
weights are listed as not covered, and the FLOP count names it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WeightedOperation:
    """A function that multiplies its input with a weight.

    Attributes:
        name: for reports.
        kernel_rank: number of kernel dimensions of the weight; 0 for linear.
        reuse: `(input_shape, weight_shape, output_shape) -> MACs per weight element`.
        weight, bias: positions among the positional arguments; by keyword they are `weight` and `bias`.
    """

    name: str
    kernel_rank: int
    reuse: Callable[[Shape, Shape, Shape], int]
    weight: int = 1
    bias: int = 2


def positions(shape: Shape, kernel_rank: int) -> int:
    """Images times positions of a feature map `(N, C, *spatial)`, or `(C, *spatial)` without a batch."""
    batch = shape[0] if len(shape) == kernel_rank + 2 else 1
    return batch * prod(shape[-kernel_rank:])


def _per_output_position(kernel_rank: int) -> Callable[[Shape, Shape, Shape], int]:
    """A convolution uses every weight once per output position and image, on padding too."""
    return lambda input_shape, weight_shape, output_shape: positions(output_shape, kernel_rank)


def _per_input_position(kernel_rank: int) -> Callable[[Shape, Shape, Shape], int]:
    """A transposed convolution uses every weight once per *input* position and image."""
    return lambda input_shape, weight_shape, output_shape: positions(input_shape, kernel_rank)


def _per_row(input_shape: Shape, weight_shape: Shape, output_shape: Shape) -> int:
    """A linear uses every weight once per row of its input."""
    return prod(input_shape[:-1])


WEIGHTED: dict[Callable, WeightedOperation] = {
    F.linear: WeightedOperation("linear", 0, _per_row),
    torch.conv1d: WeightedOperation("conv1d", 1, _per_output_position(1)),
    torch.conv2d: WeightedOperation("conv2d", 2, _per_output_position(2)),
    torch.conv3d: WeightedOperation("conv3d", 3, _per_output_position(3)),
    torch.conv_transpose1d: WeightedOperation("conv_transpose1d", 1, _per_input_position(1)),
    torch.conv_transpose2d: WeightedOperation("conv_transpose2d", 2, _per_input_position(2)),
    torch.conv_transpose3d: WeightedOperation("conv_transpose3d", 3, _per_input_position(3)),
}


@dataclass(frozen=True)
class FusedOperation:
    """A function with several weights, or more than one product, that uses every weight element once per input row.

    Attributes:
        name: for reports.
        weights: node -> the arguments that are weights, biases perhaps among them.
    """

    name: str
    weights: Callable[[fx.Node], list[Any]]


def _recurrent_weights(node: fx.Node) -> list[Any]:
    """Of `(input, state, weights, has_biases, ...)`, or packed, of `(data, batch_sizes, state, weights, ...)`."""
    weights: Any = node.args[2] if isinstance(node.args[3], bool) else node.args[3]
    return list(weights)


def _cell_weights(node: fx.Node) -> list[Any]:
    return [
        node.args[index] if len(node.args) > index else node.kwargs.get(name)
        for index, name in ((2, "w_ih"), (3, "w_hh"))
    ]


FUSED: dict[Callable, FusedOperation] = {
    **{
        getattr(torch, name): FusedOperation(name, _recurrent_weights)
        for name in ("gru", "lstm", "rnn_tanh", "rnn_relu")
    },
    **{
        getattr(torch, name): FusedOperation(name, _cell_weights)
        for name in ("gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell")
    },
    F.bilinear: FusedOperation("bilinear", lambda node: list(node.args[2:3]) or [node.kwargs.get("weight")]),
}

_FACTORS = ((0, "input"), (1, "other"))
_ADDED_FACTORS = ((1, "mat1"), (2, "mat2"))
PRODUCTS: dict[str, tuple[tuple[int, str], tuple[int, str]]] = {
    "matmul": _FACTORS,
    "__matmul__": _FACTORS,
    "__rmatmul__": _FACTORS[::-1],
    "mm": ((0, "input"), (1, "mat2")),
    "bmm": ((0, "input"), (1, "mat2")),
    "mv": ((0, "input"), (1, "vec")),
    "addmm": _ADDED_FACTORS,
    "addmv": ((1, "mat"), (2, "vec")),
    "grouped_mm": ((0, "mat_a"), (1, "mat_b")),
    "_grouped_mm": ((0, "self"), (1, "mat2")),
    "baddbmm": ((1, "batch1"), (2, "batch2")),
}
"""Matrix products by short name, as functions and methods: where the left and the right factor are. And `einsum`."""

RANDOM = frozenset("rand randn randint normal bernoulli multinomial rand_like randn_like randint_like randperm".split())
"""Functions whose result differs from call to call."""

EMBEDDINGS = (F.embedding, F.embedding_bag)
"""Functions that read rows of a parameter: no arithmetic, and a reason to leave a tied weight dense."""
