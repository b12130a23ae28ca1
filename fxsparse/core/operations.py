"""What fxsparse knows of each operation, a row an operation.

Today a row says where a weighted operation takes its weight and how often one weight element is used
(its MACs). An operation that is not in the table is never guessed at: its weights are listed as not
covered, and the FLOP count names it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WeightedOperation:
    """A function that multiplies its input with a weight.

    Attributes:
        name: for reports.
        kernel_rank: number of kernel dimensions of the weight; 0 for linear.
        reuse: `(input_shape, weight_shape, output_shape) -> MACs per weight element`.
        weight: position of the weight among the positional arguments; by keyword it is `weight`.
    """

    name: str
    kernel_rank: int
    reuse: Callable[[Shape, Shape, Shape], int]
    weight: int = 1


def _per_output_position(kernel_rank: int) -> Callable[[Shape, Shape, Shape], int]:
    """A convolution uses every weight once per output position and image."""

    def reuse(input_shape: Shape, weight_shape: Shape, output_shape: Shape) -> int:
        batch = output_shape[0] if len(output_shape) == kernel_rank + 2 else 1
        return batch * prod(output_shape[-kernel_rank:])

    return reuse


def _per_input_position(kernel_rank: int) -> Callable[[Shape, Shape, Shape], int]:
    """A transposed convolution uses every weight once per *input* position and image."""

    def reuse(input_shape: Shape, weight_shape: Shape, output_shape: Shape) -> int:
        batch = input_shape[0] if len(input_shape) == kernel_rank + 2 else 1
        return batch * prod(input_shape[-kernel_rank:])

    return reuse


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

EMBEDDINGS = (F.embedding, F.embedding_bag)
"""Functions that read rows of a parameter: no arithmetic, and a reason to leave a tied weight dense."""

UNCOUNTED = frozenset(
    """
    _adaptive_avg_pool2d _adaptive_avg_pool3d _local_scalar_dense _log_softmax _native_batch_norm_legit
    _reshape_alias _softmax _thnn_fused_gru_cell _thnn_fused_lstm_cell _to_copy _unsafe_view adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_max_pool2d alias all amax amin any arange argmax argmin avg_pool1d avg_pool2d
    avg_pool3d bernoulli bernoulli_ cat clone constant_pad_nd copy copy_ cudnn_batch_norm cumsum detach
    embedding empty empty_like empty_strided expand fill_ flip full full_like gather hardswish im2col index index_put
    index_put_ index_select lift_fresh lift_fresh_copy linspace max max_pool2d_with_indices
    max_pool3d_with_indices mean min mkldnn_max_pool2d native_batch_norm native_dropout native_group_norm
    native_layer_norm new_empty new_full new_ones new_zeros normal_ ones ones_like pixel_shuffle pixel_unshuffle
    prod rand rand_like randint randn randperm reflection_pad1d reflection_pad2d reflection_pad3d repeat
    replication_pad1d replication_pad2d replication_pad3d resize_ roll scalar_tensor scatter scatter_
    select_scatter slice_scatter sort split_with_sizes_copy stack std sum topk tril tril_ triu triu_ uniform
    uniform_ upsample_bicubic2d upsample_bilinear2d upsample_nearest1d upsample_nearest2d upsample_nearest3d var
    var_mean zero zero_ zeros zeros_like
    """.split()
)
"""ATen operations outside the MAC convention: data movement, normalisation, pooling, softmax, reductions, random
numbers. Views and pointwise operations are recognised by their tags."""


def attention_macs(query: Shape, key: Shape, value: Shape) -> int:
    """MACs of `softmax(Q K^T) V` for `(..., length, features)` operands; a mask saves nothing."""
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
