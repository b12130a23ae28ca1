"""What each operation does to channels: a row an operation.

A row names the *kind* of the operation, which decides how labels pass through it (`passes/propagate_channels.py`)
and what has to be rewritten when channels go (`passes/rewrite_channels.py`):

| kind | labels | when channels go |
| --- | --- | --- |
| elementwise | operands are united element by element | nothing to rewrite |
| spatial | kept per channel, united over the last `rank` dimensions | nothing |
| movement | executed on the labels | sizes, sections and ranges among the arguments |
| weighted, embedding | consumed and minted along the dimensions of the weight | `groups` |
| per_channel_norm, prelu | parameters join the channels of dimension 1 | nothing |
| group_norm, layer_norm | mixed along dimensions: norm-coupled | zeros in their place (`passes/rewrite_norms.py`) |
| reduction, across_channels | mixed along dimensions: norm-coupled | (never cut along those) |
| glu | the two halves are united | nothing |
| contraction, attention | united per batch index (a head) | nothing |
| made | a new tensor that is never cut | nothing |

An operation without a row pins every channel that it touches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from .graphs import attribute, operation_name
from .masking import apply_mask
from .operations import EMBEDDINGS, WEIGHTED


@dataclass(frozen=True)
class ChannelRule:
    """One row.

    Attributes:
        kind: as in the table at the head of this file.
        rank: of a spatial operation, the number of spatial dimensions; 0 for all after the second.
        constant: of an elementwise operation, whether it maps what is known to be constant to a constant that
            running it on that value gives (a NaN stands for what is not known and has to come out as NaN).
    """

    kind: str
    rank: int = 0
    constant: bool = False


def _rows(kind: str, names: str, **facts: Any) -> dict[str, ChannelRule]:
    return dict.fromkeys(names.split(), ChannelRule(kind, **facts))


NAMED: dict[str, ChannelRule] = {
    # one operand, or several of broadcasting shapes
    **_rows(
        "elementwise",
        """relu relu6 leaky_relu elu selu celu gelu silu mish hardtanh hardswish hardsigmoid sigmoid logsigmoid
        tanh softplus softsign tanhshrink sin cos tan asin acos atan sinh cosh asinh acosh atanh exp expm1 log log1p
        log2 log10 sqrt rsqrt square reciprocal abs neg floor ceil round trunc erf clamp
        add sub rsub mul div truediv pow iadd isub imul itruediv ipow multiply divide true_divide subtract
        contiguous clone detach identity float double half bfloat16 to type type_as positive""",
        constant=True,
    ),
    **_rows(
        "elementwise",
        """dropout alpha_dropout dropout1d dropout2d dropout3d feature_dropout feature_alpha_dropout rrelu softshrink
        hardshrink threshold sign sgn maximum minimum fmax fmin where masked_fill lerp addcmul addcdiv atan2 fmod
        remainder mod floordiv floor_divide logical_and logical_or logical_not logical_xor and or xor not invert
        bitwise_and bitwise_or bitwise_not eq ne lt le gt ge isnan isinf isfinite nan_to_num bool int long
        zeros_like ones_like full_like empty_like rand_like randn_like requires_grad_ bernoulli xlogy
        heaviside hypot stochastic_depth cuda cpu real data zero fill""",
    ),
    # along the last dimensions, channel by channel
    **_rows("spatial", "max_pool1d avg_pool1d lp_pool1d adaptive_avg_pool1d adaptive_max_pool1d", rank=1),
    **_rows("spatial", "max_pool2d avg_pool2d lp_pool2d adaptive_avg_pool2d adaptive_max_pool2d", rank=2),
    **_rows("spatial", "max_pool3d avg_pool3d lp_pool3d adaptive_avg_pool3d adaptive_max_pool3d", rank=3),
    **_rows("spatial", "max_pool1d_with_indices adaptive_max_pool1d_with_indices", rank=1),
    **_rows("spatial", "max_pool2d_with_indices adaptive_max_pool2d_with_indices", rank=2),
    **_rows("spatial", "max_pool3d_with_indices adaptive_max_pool3d_with_indices", rank=3),
    **_rows("spatial", "interpolate upsample upsample_nearest upsample_bilinear grid_sample"),
    # the same elements elsewhere
    **_rows(
        "movement",
        """view reshape flatten unflatten ravel permute transpose t swapaxes swapdims moveaxis movedim squeeze unsqueeze
        expand broadcast_to cat concat concatenate stack hstack vstack split split_with_sizes chunk tensor_split unbind
        narrow select getitem roll flip repeat tile repeat_interleave pixel_shuffle pixel_unshuffle channel_shuffle
        T mT pad adjoint expand_as view_as reshape_as""",
    ),
    **_rows("per_channel_norm", "batch_norm instance_norm"),
    **_rows("group_norm", "group_norm"),
    **_rows("layer_norm", "layer_norm rms_norm"),
    **_rows(
        "reduction",
        """mean sum nansum prod amax amin max min all any std var norm logsumexp softmax log_softmax softmin
        argmax argmin cumsum cumprod sort argsort topk median normalize vector_norm""",
    ),
    **_rows("glu", "glu"),
    **_rows("prelu", "prelu"),
    **_rows("contraction", "matmul bmm __matmul__ imatmul"),
    **_rows("attention", "scaled_dot_product_attention"),
    **_rows(
        "made",
        """arange zeros ones full empty eye linspace rand randn randint tensor new_zeros new_ones new_full new_empty
        new_tensor randperm meshgrid""",
    ),
}
"""Functions of torch and operator, and methods of tensors, by their short name without a trailing underscore."""

FUNCTIONS: dict[Callable, ChannelRule] = {
    **dict.fromkeys(WEIGHTED, ChannelRule("weighted")),
    **dict.fromkeys(EMBEDDINGS[:1], ChannelRule("embedding")),
    apply_mask: ChannelRule("mask"),
}

_MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "elementwise": (
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardtanh, nn.Hardswish,
        nn.Hardsigmoid, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Tanhshrink, nn.Identity,
    ),
    "random": (
        nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU,
        nn.Softshrink, nn.Hardshrink, nn.Threshold,
    ),
    "movement": (
        nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
        nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
        nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
        nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
        nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
    ),
    "per_channel_norm": (
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
        nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    ),
    "prelu": (nn.PReLU,),
    "group_norm": (nn.GroupNorm,),
    "layer_norm": (nn.LayerNorm, nn.RMSNorm),
    "glu": (nn.GLU,),
    "reduction": (nn.Softmax, nn.LogSoftmax, nn.Softmin),
    "across_channels": (nn.Softmax2d, nn.LocalResponseNorm),
}  # fmt: skip

_POOLING = "MaxPool AvgPool LPPool AdaptiveAvgPool AdaptiveMaxPool".split()

MODULES: dict[type[nn.Module], ChannelRule] = {
    **{cls: ChannelRule("elementwise", constant=True) for cls in _MODULES["elementwise"]},
    **{cls: ChannelRule("elementwise") for cls in _MODULES["random"]},
    **{getattr(nn, f"{name}{rank}d"): ChannelRule("spatial", rank) for name in _POOLING for rank in (1, 2, 3)},
    **{cls: ChannelRule("spatial") for cls in (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)},
    **{
        cls: ChannelRule(kind)
        for kind, classes in _MODULES.items()
        if kind not in ("elementwise", "random")
        for cls in classes
    },
}
"""Modules that stay one call in a graph, by exact class: a subclass may do anything in its `forward`."""

ELSEWHERE: dict[str, ChannelRule] = {
    "torchvision.ops.stochastic_depth.StochasticDepth": ChannelRule("elementwise"),
    "torchvision.ops.misc.Permute": ChannelRule("movement"),
    "torchvision.ops.misc.FrozenBatchNorm2d": ChannelRule("per_channel_norm"),
}
"""Modules of packages that are not imported for this."""

_OWN_NAMES = ("torch", "_operator", "operator", "math", "builtins")


def channel_rule(root: nn.Module, node: fx.Node) -> ChannelRule | None:
    """The row of what a node calls; None where there is none, or where the node looks at plain values only."""
    if node.op == "call_module":
        return module_rule(type(attribute(root, str(node.target))))
    if node.op == "call_method":
        return NAMED.get(plain_name(str(node.target)))
    if node.op != "call_function":
        return None
    if node.target in FUNCTIONS:
        return FUNCTIONS[node.target]
    if node.target is getattr:
        return NAMED.get(str(node.args[1])) if node.args[1] in ("T", "mT", "real", "data") else None
    module = getattr(node.target, "__module__", None) or "torch"
    if module.partition(".")[0] not in _OWN_NAMES and module != "torchvision.ops.stochastic_depth":
        return None
    return NAMED.get(plain_name(operation_name(node)))


def module_rule(cls: type[nn.Module]) -> ChannelRule | None:
    """The row of a class of modules."""
    return MODULES.get(cls) or ELSEWHERE.get(f"{cls.__module__}.{cls.__qualname__}")


def plain_name(name: str) -> str:
    """`relu_` and `relu` are one operation, and so are `operator.add` and `__add__`."""
    if name.startswith("__") and name.endswith("__"):
        stripped = name[2:-2]
        return name if stripped == "matmul" else stripped
    return name[:-1] if name.endswith("_") and name[:-1] in NAMED else name
