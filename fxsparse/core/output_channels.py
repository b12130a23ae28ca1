"""Which dimension of a parameter runs over the output, or the input, channels of the weight that is made of it.

`x @ w` has them last, `F.linear(x, w)` first, `x @ w.t()` first again, a transposed convolution second. A weight is
followed back to its parameter by the strides of its views: the axis of the weight that makes the outputs has the
stride of one of the parameter's dimensions. Where a copy on the way loses that trace, the dimension is not known.
"""

from collections.abc import Iterable, Sequence
from math import prod

from torch import fx, nn

from .graphs import operation_name
from .records import TensorSpec, record_of
from .weight_operands import WeightOperand, shape_of
from .weight_origin import Origin


def output_channels(
    parameter: nn.Parameter, operands: Iterable[tuple[WeightOperand, Origin]]
) -> tuple[int | None, int]:
    """The dimension of `parameter` over the output channels, and into how many groups (of a convolution) it falls.

    The dimension is None where it is not known, or where uses differ in it or in the groups.
    """
    return _agreed(
        (_dim_of(parameter, operand, operand.output_axis), _groups_of(operand, origin)) for operand, origin in operands
    )


def input_channels(parameter: nn.Parameter, operands: Iterable[tuple[WeightOperand, Origin]]) -> tuple[int | None, int]:
    """The same of the input channels, over which products are summed.

    A convolution's weight has those of one group; a transposed one's has all of them, group by group. Where a view
    splits a dimension into outputs and inputs, the inputs of every output are a group; where one joins dimensions, the
    last of them is the one.
    """
    found = []
    for operand, origin in operands:
        dim = _dim_of(parameter, operand, operand.input_axis)
        found.append((dim, 0 if dim is None else _input_groups(parameter.shape[dim], operand, origin)))
    return _agreed(found)


def _agreed(found: Iterable[tuple[int | None, int]]) -> tuple[int | None, int]:
    different = set(found)
    if len(different) != 1:
        return None, 1
    ((dim, groups),) = different
    return (dim, groups) if dim is not None and groups else (None, 1)


def _groups_of(operand: WeightOperand, origin: Origin) -> int:
    """Groups along the output channels; 0 where a part of a parameter has several, which nothing here can place.

    The outputs of a transposed convolution are counted within a group already.
    """
    if operand.groups == 1 or operand.operation.startswith("conv_transpose"):
        return 1
    return 0 if origin.is_part else operand.groups


def _input_groups(size: int, operand: WeightOperand, origin: Origin) -> int:
    """Groups along the input channels, whose dimension of the parameter has that size; 0 as above."""
    assert operand.input_axis is not None
    inputs = shape_of(operand.node)[operand.input_axis]
    if inputs < size:
        return 0 if size % inputs or operand.groups > 1 else size // inputs
    if operand.groups == 1 or not operand.operation.startswith("conv_transpose"):
        return 1
    return 0 if origin.is_part else operand.groups


def _dim_of(parameter: nn.Parameter, operand: WeightOperand, axis: int | None) -> int | None:
    node = operand.node
    if axis is None:
        return None
    axis %= len(shape_of(node))
    if node.op == "get_attr":
        return axis
    spec = record_of(node).spec
    if not isinstance(spec, TensorSpec) or not spec.stride or not _strides_tell(node):
        return None
    stride = spec.stride[axis]
    dims = [dim for dim, size in enumerate(parameter.shape) if size > 1 and parameter.stride(dim) == stride]
    return dims[0] if len(dims) == 1 and spec.shape[axis] > 1 else None


def _strides_tell(node: fx.Node) -> bool:
    """Whether no copy in another order lies between a weight and its parameter."""
    while node.op in ("call_function", "call_method") and node.args and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        spec = record_of(source).spec
        is_dense = isinstance(spec, TensorSpec) and bool(spec.stride) and _is_row_major(spec.shape, spec.stride)
        if operation_name(node) in COPIES and not is_dense:
            return False
        node = source
    return True


def _is_row_major(shape: Sequence[int], stride: Sequence[int]) -> bool:
    return all(size == 1 or stride[dim] == prod(shape[dim + 1 :]) for dim, size in enumerate(shape))


COPIES = frozenset("contiguous reshape reshape_as flatten ravel".split())
"""Operations that copy where they cannot be a view, and then in row-major order."""
