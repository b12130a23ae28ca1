"""What every ATen operation costs, a row an operation: MACs of contractions, FLOPs of everything else.

`aten_cost` looks an operation up. MACs are the products of a contraction, padding included. The other
arithmetic has no agreed unit, so it is kept apart in categories, with one stated price each:

    bias           1 FLOP per output element
    normalisation  2 per element with stored statistics, 5 with those of the batch, 2 more with scale and shift
    activation     1 per element and call, whatever the function
    pooling        1 per element read; resampling: 1 per element and neighbour read
    softmax        5 per element (maximum, difference, exponential, sum, quotient)
    reduction      1 per element read (variance: 4)
    elementwise    1 per output element

An operation that is in no row is reported by name. What costs nothing is on a list too: `FREE`, and views.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

CATEGORIES = ("bias", "normalisation", "activation", "pooling", "softmax", "reduction", "elementwise")
"""The kinds of arithmetic that are not MACs, in the order of reports."""


@dataclass(frozen=True)
class Cost:
    """What one call costs: `macs`, and FLOPs by category of what is not a MAC."""

    macs: int = 0
    other: dict[str, int] = field(default_factory=dict)


Rule = Callable[[tuple, dict[str, Any], Any], Cost]
"""`(args, kwargs, result) -> Cost`; tensors are looked at for their shapes only."""


# -- contractions -------------------------------------------------------------------------------------------


def attention_macs(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> int:
    """MACs of `softmax(Q K^T) V` for `(..., length, features)` operands; masks, causal ones too, save nothing.

    With grouped queries, `key` and `value` have fewer heads: every query head meets its group's keys.
    """
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def convolution_macs(input: Tensor, weight: Tensor, output: Tensor, transposed: bool) -> int:
    """Every weight element once per image and output position (transposed: input position)."""
    places = input if transposed else output
    batch = places.shape[0] if places.ndim == weight.ndim else 1
    return weight.numel() * batch * prod(places.shape[2 - weight.ndim :])


def _matrix_product(a: int, b: int, added: bool = False) -> Rule:
    """`args[a] @ args[b]`, batched or not; `args[0]` is added where `added`."""

    def rule(args: tuple, kwargs: dict[str, Any], result: Any) -> Cost:
        columns = args[b].shape[-1] if args[b].ndim > 1 else 1
        other = {"bias": result.numel()} if added and kwargs.get("beta", 1) != 0 else {}
        return Cost(args[a].numel() * columns, other)

    return rule


def _outer(added: bool) -> Rule:
    def rule(args: tuple, kwargs: dict[str, Any], result: Tensor) -> Cost:
        return Cost(result.numel(), {"bias": result.numel()} if added else {})

    return rule


def _convolution(args: tuple, kwargs: dict[str, Any], result: Tensor) -> Cost:
    input, weight, bias = args[:3]
    other = {"bias": result.numel()} if bias is not None else {}
    return Cost(convolution_macs(input, weight, result, args[6]), other)


def _linear(args: tuple, kwargs: dict[str, Any], result: Tensor) -> Cost:
    other = {"bias": result.numel()} if len(args) > 2 and args[2] is not None else {}
    return Cost(prod(args[0].shape[:-1]) * args[1].numel(), other)


def _trilinear(args: tuple, kwargs: dict[str, Any], result: Tensor) -> Cost:
    """A bilinear's weight, (out, in1, in2): every element once per row."""
    return Cost(args[1].numel() * prod(args[0].shape[:-1]))


def _deform_conv2d(args: tuple, kwargs: dict[str, Any], result: Tensor) -> Cost:
    """As a plain convolution; sampling the input bilinearly is resampling, four neighbours a tap."""
    weight, bias = args[1], args[4]
    taps = result.shape[0] * prod(result.shape[-2:]) * prod(weight.shape[-2:]) * args[0].shape[1]
    other = {"pooling": 4 * taps, "bias": result.numel() if bias is not None else 0}
    return Cost(weight.numel() * result.shape[0] * prod(result.shape[-2:]), other)


def _attention(args: tuple, kwargs: dict[str, Any], result: Any) -> Cost:
    query, key, value = args[:3]
    macs = attention_macs(tuple(query.shape), tuple(key.shape), tuple(value.shape))
    return Cost(macs, {"softmax": 5 * prod(query.shape[:-1]) * key.shape[-2]})


def _attention_backward(args: tuple, kwargs: dict[str, Any], result: Any) -> Cost:
    """Both contractions have two gradients each; scores that a kernel computes again are not counted."""
    query, key, value = args[1:4]
    return Cost(2 * attention_macs(tuple(query.shape), tuple(key.shape), tuple(value.shape)))


def _convolution_backward(args: tuple, kwargs: dict[str, Any], result: Any) -> Cost:
    """Each product of the forward pass gives one product in each gradient that is asked for."""
    gradient, input, weight = args[:3]
    transposed, wanted = args[7], args[10]
    macs = convolution_macs(input, weight, gradient, transposed)
    return Cost(macs * (bool(wanted[0]) + bool(wanted[1])), {"bias": gradient.numel() if wanted[2] else 0})


def _deform_conv2d_backward(args: tuple, kwargs: dict[str, Any], result: Any) -> Cost:
    gradient, weight = args[0], args[2]
    return Cost(2 * weight.numel() * gradient.shape[0] * prod(gradient.shape[-2:]))


def _pairwise_distance(args: tuple, kwargs: dict[str, Any], result: Tensor) -> Cost:
    return Cost(result.numel() * args[0].shape[-1])


CONTRACTIONS: dict[str, Rule] = {
    "mm": _matrix_product(0, 1),
    "bmm": _matrix_product(0, 1),
    "mv": _matrix_product(0, 1),
    "dot": _matrix_product(0, 1),
    "vdot": _matrix_product(0, 1),
    "addmm": _matrix_product(1, 2, added=True),
    "addmv": _matrix_product(1, 2, added=True),
    "baddbmm": _matrix_product(1, 2, added=True),
    "addbmm": _matrix_product(1, 2, added=True),
    "_addmm_activation": _matrix_product(1, 2, added=True),
    "outer": _outer(added=False),
    "ger": _outer(added=False),
    "addr": _outer(added=True),
    "linear": _linear,
    "convolution": _convolution,
    "_convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "_trilinear": _trilinear,
    "deform_conv2d": _deform_conv2d,
    "_deform_conv2d_backward": _deform_conv2d_backward,
    "_cdist_forward": _pairwise_distance,
    "_euclidean_dist": _pairwise_distance,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "_scaled_dot_product_flash_attention_backward": _attention_backward,
    "_scaled_dot_product_efficient_attention_backward": _attention_backward,
    "_scaled_dot_product_cudnn_attention_backward": _attention_backward,
}


# -- everything else that computes --------------------------------------------------------------------------


def _priced(category: str, price: int, read: bool = False) -> Rule:
    """`price` FLOPs per element of the result, or of the first argument where `read`."""

    def rule(args: tuple, kwargs: dict[str, Any], result: Any) -> Cost:
        tensor = args[0] if read else result
        tensor = (
            next((t for t in tensor if isinstance(t, Tensor)), None) if isinstance(tensor, tuple | list) else tensor
        )
        return Cost(0, {category: price * tensor.numel()}) if isinstance(tensor, Tensor) else Cost()

    return rule


def _window(rank: int) -> Rule:
    """Pooling: as many elements read as the window has, for every output element."""

    def rule(args: tuple, kwargs: dict[str, Any], result: Any) -> Cost:
        kernel = args[1] if len(args) > 1 else kwargs["kernel_size"]
        kernel = [kernel] * rank if isinstance(kernel, int) else list(kernel)
        window = prod(kernel) if len(kernel) == rank else kernel[0] ** rank
        output = result[0] if isinstance(result, tuple) else result
        return Cost(0, {"pooling": window * output.numel()})

    return rule


def _normalisation(stored: int | None) -> Rule:
    """Scale and shift by stored statistics (when argument `stored` says so), or by the batch's own."""

    def rule(args: tuple, kwargs: dict[str, Any], result: Any) -> Cost:
        affine = 2 if any(isinstance(a, Tensor) for a in args[1:3]) else 0
        if stored is not None and not args[stored]:
            return Cost(0, {"normalisation": 2 * args[0].numel()})
        return Cost(0, {"normalisation": (5 + affine) * args[0].numel()})

    return rule


_ACTIVATIONS = """
    relu relu6 leaky_relu prelu _prelu_kernel rrelu_with_noise elu celu selu gelu silu mish hardswish hardsigmoid
    hardtanh sigmoid log_sigmoid_forward tanh softplus softshrink hardshrink threshold glu erf
"""

_REDUCTIONS = """
    sum mean prod amax amin max min aminmax all any logsumexp norm linalg_vector_norm cumsum cumprod count_nonzero
    nansum median nanmedian logcumsumexp _embedding_bag _embedding_bag_forward_only segment_reduce trace
"""

OTHER: dict[str, Rule] = {
    **{name: _priced("activation", 1) for name in _ACTIVATIONS.split()},
    **{name: _priced("reduction", 1, read=True) for name in _REDUCTIONS.split()},
    **{name: _priced("reduction", 4, read=True) for name in ("var", "std", "var_mean", "std_mean", "_fused_moments")},
    **{name: _priced("softmax", 5) for name in ("_softmax", "_log_softmax", "_safe_softmax", "_masked_softmax")},
    **{f"{kind}_pool{rank}d": _window(rank) for kind in ("avg", "max") for rank in (1, 2, 3)},
    **{f"max_pool{rank}d_with_indices": _window(rank) for rank in (2, 3)},
    **{f"_adaptive_avg_pool{rank}d": _priced("pooling", 1, read=True) for rank in (2, 3)},
    **{
        f"adaptive_{kind}_pool{rank}d": _priced("pooling", 1, read=True)
        for kind in ("avg", "max")
        for rank in (1, 2, 3)
    },
    **{f"fractional_max_pool{rank}d": _window(rank) for rank in (2, 3)},
    "upsample_linear1d": _priced("pooling", 2),
    "upsample_bilinear2d": _priced("pooling", 4),
    "_upsample_bilinear2d_aa": _priced("pooling", 4),
    "upsample_trilinear3d": _priced("pooling", 8),
    "upsample_bicubic2d": _priced("pooling", 16),
    "_upsample_bicubic2d_aa": _priced("pooling", 16),
    "grid_sampler_2d": _priced("pooling", 4),
    "grid_sampler_3d": _priced("pooling", 8),
    "roi_align": _priced("pooling", 4),
    "native_batch_norm": _normalisation(5),
    "cudnn_batch_norm": _normalisation(5),
    "miopen_batch_norm": _normalisation(5),
    "_native_batch_norm_legit": _normalisation(5),
    "_native_batch_norm_legit_no_training": _priced("normalisation", 2),
    "_batch_norm_impl_index": _normalisation(5),
    "native_layer_norm": lambda args, kwargs, result: _normalisation(None)((args[0], *args[2:4]), kwargs, result),
    "native_group_norm": _normalisation(None),
    "_fused_rms_norm": _priced("normalisation", 4),
    "_weight_norm_interface": _priced("normalisation", 4, read=True),
    "native_dropout": _priced("elementwise", 1),
    "_thnn_fused_gru_cell": _priced("activation", 3),
    "_thnn_fused_lstm_cell": _priced("activation", 5),
    "im2col": _priced("elementwise", 0),
    "col2im": _priced("reduction", 1, read=True),
    "addcmul": _priced("elementwise", 2),
    "addcdiv": _priced("elementwise", 2),
    "mse_loss": _priced("reduction", 3, read=True),  # difference, square, sum
}

FREE = frozenset(
    """
    _assert_async _assert_scalar _assert_tensor_metadata _conj _local_scalar_dense _nested_tensor_from_mask
    _pack_padded_sequence _pad_packed_sequence _reshape_alias _reshape_copy _shape_as_tensor _to_copy _unsafe_index
    _unsafe_index_put _unsafe_view _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    arange argmax argmin argsort as_strided as_strided_copy as_strided_scatter bernoulli bucketize can_cast cat
    channel_shuffle clone complex constant_pad_nd copy detach detach_copy device diag_embed diagonal_scatter dim
    dropout embedding empty empty_like empty_permuted empty_strided equal expand_copy exponential eye fill flip full
    full_like gather index index_copy index_fill index_put index_select is_nonzero is_same_size isin item
    layout lift lift_fresh lift_fresh_copy linspace logspace masked_fill masked_scatter masked_select
    mkldnn_reorder_conv2d_weight mode multinomial narrow_copy new_empty new_empty_strided new_full new_ones
    new_zeros nonzero nonzero_static normal normal_functional numel one_hot ones ones_like pad pad_sequence
    permute_copy pixel_shuffle pixel_unshuffle prim_device put rand rand_like randint randint_like randn randn_like
    random randperm reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d
    replication_pad2d replication_pad3d resize resize_as result_type roll rot90 scalar_tensor scatter searchsorted
    select_copy select_scatter set_ size slice_copy slice_scatter sort split split_copy split_with_sizes
    split_with_sizes_copy squeeze squeeze_copy stack stride swapaxes swapdims sym_numel sym_size sym_storage_offset
    sym_stride t t_copy take to topk transpose transpose_copy tril tril_indices triu triu_indices unbind_copy unfold
    unfold_copy uniform unique_dim unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze unsqueeze_copy
    upsample_nearest1d upsample_nearest2d upsample_nearest3d view_copy where zero zeros zeros_like
    """.split()
)
"""ATen operations without arithmetic: creation, copies, padding, indexing, ordering, random numbers, queries.
Views are free too; they are known by their schema."""


def aten_cost(operator: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> Cost | None:
    """What one call of an ATen (or torchvision) operator costs; None where there is no rule for it."""
    rule = _rule(operator)
    if rule is None or _accumulates(operator, args, kwargs):
        return None
    return rule(args, kwargs, result)


def _accumulates(operator: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether an indexed write adds to what is there, which no rule prices, rather than replacing it."""
    found = _accumulating_argument(operator)
    if found is None:
        return False
    index, name = found
    value = args[index] if index < len(args) else kwargs.get(name)
    return isinstance(value, (bool, str)) and bool(value)


@cache
def _accumulating_argument(operator: Any) -> tuple[int, str] | None:
    """Position and name of the argument that makes an indexed write add, for the operators that have one."""
    for index, argument in enumerate(operator._schema.arguments):
        if argument.name in ("accumulate", "reduce"):
            return index, argument.name
    return None


@cache
def _rule(operator: Any) -> Rule | None:
    name = operator._overloadpacket.__name__
    if operator.namespace in ("prim", "prims"):
        return _nothing
    if operator.namespace not in ("aten", "torchvision"):
        return None
    found = _named_rule(operator, name)
    if found is None and name.endswith("_"):  # in place: the same arithmetic
        found = _named_rule(operator, name[:-1])
    if found is None and torch.Tag.pointwise in operator.tags:
        found = _priced("elementwise", 1)
    return found


def _named_rule(operator: Any, name: str) -> Rule | None:
    if name in CONTRACTIONS:
        return CONTRACTIONS[name]
    if name in OTHER:
        return OTHER[name]
    if name in FREE or operator.is_view:
        return _nothing
    return None


def _nothing(args: tuple, kwargs: dict[str, Any], result: Any) -> Cost:
    return Cost()
