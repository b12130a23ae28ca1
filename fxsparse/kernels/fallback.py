"""The operators on `torch.sparse`: what computes where the C++ kernels cannot be built.

A convolution is unfolded to a matrix of columns, one for each output pixel, and multiplied with compressed sparse rows.
Every function takes what the operator of its name takes (`operators.py`) and gives what it gives.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_LIMIT = 2**31


@dataclass(frozen=True)
class _Convolution:
    """Settings of a convolution, as the operators take them."""

    weight: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    block: int

    def __post_init__(self) -> None:
        _require(len(self.weight) == 4 and min(self.weight) >= 0 and min(self.weight[2:]) > 0, f"weight {self.weight}")
        pairs = (self.stride, self.padding, self.dilation)
        _require(all(len(pair) == 2 for pair in pairs), f"stride, padding and dilation {pairs}")
        _require(min(self.stride) > 0 and min(self.dilation) > 0 and min(self.padding) >= 0, f"{pairs} out of range")
        _require(self.block in (1, 2, 4, 8), f"blocks of {self.block} output channels; 1, 2, 4 and 8 are known")
        whole = self.groups > 0 and self.weight[0] % (self.block * self.groups) == 0
        _require(whole, f"{self.weight[0]} output channels in {self.groups} groups and blocks of {self.block}")

    @property
    def length(self) -> int:
        """Positions in a row of the flattened weight."""
        return self.weight[1] * self.weight[2] * self.weight[3]

    @property
    def channels(self) -> int:
        return self.weight[1] * self.groups

    def output_size(self, x: Tensor) -> list[int]:
        reach = [x.shape[2 + i] + 2 * self.padding[i] - self.dilation[i] * (self.weight[2 + i] - 1) - 1 for i in (0, 1)]
        empty = 0 in x.shape[2:] and self._pointwise()
        _require(
            min(reach) >= 0 or empty, f"the kernel {self.weight[2:]} is larger than the padded input {x.shape[2:]}"
        )
        return [reach[i] // self.stride[i] + 1 for i in (0, 1)]

    def columns(self, x: Tensor) -> Tensor:
        """(groups, length, images * output pixels) of x (images, channels, height, width)."""
        pixels = x.shape[0] * torch.Size(self.output_size(x)).numel()
        if self._pointwise():
            columns = x.transpose(0, 1)
        elif x.numel() == 0:
            return x.new_zeros(self.groups, self.length, pixels)
        else:
            kernel = tuple(self.weight[2:])
            columns = F.unfold(x, kernel, tuple(self.dilation), tuple(self.padding), tuple(self.stride)).transpose(0, 1)
        return columns.reshape(self.groups, self.length, pixels)

    def pixels(self, columns: Tensor, x: Tensor) -> Tensor:
        """Sums columns (groups, length, images * output pixels) into what they were taken from, of the shape of x."""
        if x.numel() == 0 or columns.numel() == 0:
            return columns.new_zeros(x.shape)
        if self._pointwise():
            return columns.reshape(x.transpose(0, 1).shape).transpose(0, 1)
        columns = columns.reshape(self.groups * self.length, x.shape[0], -1).transpose(0, 1)
        kernel = tuple(self.weight[2:])
        return F.fold(
            columns, tuple(x.shape[2:]), kernel, tuple(self.dilation), tuple(self.padding), tuple(self.stride)
        )

    def _pointwise(self) -> bool:
        return all(self.weight[2 + i] == 1 and self.stride[i] == 1 and self.padding[i] == 0 for i in (0, 1))

    def by_rows(self, pattern: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column and place among the values of every stored weight, row by row (int64)."""
        starts, columns = pattern[0].long(), pattern[1].long()
        rows, count = self.weight[0] // self.block, len(columns)
        _require_starts(starts, rows, count)
        _require_within(columns, 0, self.length, f"columns outside of rows of {self.length} positions")
        row, place = _spread(starts, self.block)
        return row, columns[place // self.block], place

    def by_columns(self, pattern: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Column (of all groups), row and place of every stored weight, column by column (int64)."""
        _require(len(pattern) == 5, f"a pattern is five tensors, got {len(pattern)}")
        starts, rows, places = (part.long() for part in pattern[2:])
        count = len(pattern[1])
        _require_starts(starts, self.length * self.groups, count)
        _require(len(rows) == count and len(places) == count, "the pattern lists other blocks by rows than by columns")
        _require_within(places, 0, count, f"places outside of {count} blocks")
        column = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
        per_group = self.weight[0] // self.block // self.groups
        group = column // max(self.length, 1)
        _require(bool((rows // max(per_group, 1) == group).all()), "the pattern has blocks outside of their group")
        within = torch.arange(self.block)
        column = column.repeat_interleave(self.block)
        return (
            column,
            (rows[:, None] * self.block + within).flatten(),
            (places[:, None] * self.block + within).flatten(),
        )


def sparse_conv2d(x, values, pattern, bias, weight, stride, padding, dilation, groups, block):
    return sparse_conv2d_fused(
        x, values, pattern, bias, None, weight, stride, padding, dilation, groups, block, None, None
    )


def sparse_conv2d_fused(
    x, values, pattern, bias, residual, weight, stride, padding, dilation, groups, block, low, high
):
    conv = _Convolution(weight, stride, padding, dilation, groups, block)
    _check(conv, pattern, {"the input": x}, values, bias)
    rows_per_group = weight[0] // groups
    row, column, place = conv.by_rows(pattern)
    size, columns = conv.output_size(x), conv.columns(x)
    y = x.new_empty(weight[0], columns.shape[2])
    for group in range(groups):
        begin, end = (torch.searchsorted(row, at * rows_per_group) for at in (group, group + 1))
        inside = slice(int(begin), int(end))
        matrix = _matrix(
            row[inside] - group * rows_per_group, column[inside], values[place[inside]], rows_per_group, conv.length
        )
        y[group * rows_per_group : (group + 1) * rows_per_group] = matrix @ columns[group]
    y = y.reshape(weight[0], x.shape[0], *size)
    if bias is not None:
        y += bias[:, None, None, None]
    if residual is not None:
        _require(residual.shape == y.transpose(0, 1).shape, f"the residual is {residual.shape}, the output {y.shape}")
        _require(residual.dtype == x.dtype, f"the input is {x.dtype}, the residual {residual.dtype}")
        y += residual.transpose(0, 1)
    return (y if low is None and high is None else y.clamp_(low, high)).transpose(0, 1)


def sparse_conv2d_input_gradient(dy, x, values, pattern, weight, stride, padding, dilation, groups, block):
    conv = _Convolution(weight, stride, padding, dilation, groups, block)
    _check(conv, pattern, {"the input": x, "the gradient": dy}, values)
    rows_per_group = weight[0] // groups
    column, row, place = conv.by_columns(pattern)
    gradients = dy.transpose(0, 1).reshape(groups, rows_per_group, dy.shape[0] * dy.shape[2] * dy.shape[3])
    columns = dy.new_empty(groups, conv.length, gradients.shape[2])
    for group in range(groups):
        begin, end = (torch.searchsorted(column, at * conv.length) for at in (group, group + 1))
        inside = slice(int(begin), int(end))
        turned = _matrix(
            column[inside] - group * conv.length,
            row[inside] - group * rows_per_group,
            values[place[inside]],
            conv.length,
            rows_per_group,
        )
        columns[group] = turned @ gradients[group]
    return _channel_major(conv.pixels(columns, x))


def sparse_conv2d_weight_gradient(dy, x, pattern, weight, stride, padding, dilation, groups, block):
    conv = _Convolution(weight, stride, padding, dilation, groups, block)
    _check(conv, pattern, {"the input": x, "the gradient": dy})
    rows_per_group = weight[0] // groups
    row, column, place = conv.by_rows(pattern)
    block_row = torch.repeat_interleave(pattern[0].diff())
    ascending = (pattern[1].diff() > 0) | (block_row.diff() != 0)
    _require(bool(ascending.all()), "the pattern has rows whose columns do not ascend")
    columns = conv.columns(x)
    gradients = dy.transpose(0, 1).reshape(groups, rows_per_group, columns.shape[2])
    dvalues = x.new_zeros(len(row))
    for group in range(groups):
        begin, end = (int(torch.searchsorted(row, at * rows_per_group)) for at in (group, group + 1))
        dense = gradients[group] @ columns[group].t()
        inside = slice(begin, end)
        dvalues[place[inside]] = dense[row[inside] - group * rows_per_group, column[inside]]
    return dvalues


def sparse_linear_fused(x, values, pattern, bias, outputs, block, low, high):
    _require(x.dim() >= 1, "expected (..., inputs), got a number")
    shape, inputs = x.shape[:-1], x.shape[-1]
    pixels = x.reshape(shape.numel(), inputs).t()[None, :, None]
    weight = (outputs, inputs, 1, 1)
    y = sparse_conv2d_fused(pixels, values, pattern, bias, None, weight, (1, 1), (0, 0), (1, 1), 1, block, low, high)
    return y[0, :, 0].t().reshape(*shape, outputs)


def _matrix(row: Tensor, column: Tensor, values: Tensor, rows: int, columns: int) -> Tensor:
    """Compressed sparse rows of entries in the order of rows."""
    starts = torch.cat([row.new_zeros(1), torch.bincount(row, minlength=rows).cumsum(0)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta.*")
        return torch.sparse_csr_tensor(starts, column, values, (rows, columns), check_invariants=False)


def _spread(starts: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Row and place of every value of blocks of rows: blocks hold a value for each of their rows."""
    counts = starts.diff().repeat_interleave(block)
    row = torch.repeat_interleave(torch.arange(len(counts)), counts)
    before = counts.cumsum(0) - counts
    index = torch.arange(len(row)) - before[row] + starts[row // block]
    return row, index * block + row % block


def _channel_major(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _check(
    conv: _Convolution,
    pattern: Sequence[Tensor],
    activations: dict[str, Tensor],
    values: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    x = activations["the input"]
    for name, tensor in activations.items():
        _require(tensor.dtype in (torch.float32, torch.float64), f"{name} is {tensor.dtype}; float32 and float64 work")
        channels = conv.channels if tensor is x else conv.weight[0]
        _require(
            tensor.dim() == 4 and tensor.shape[1] == channels,
            f"expected {name} (images, {channels}, height, width), got {tuple(tensor.shape)}",
        )
    for name, other in (*activations.items(), ("the values", values), ("the bias", bias)):
        if other is not None:
            _require(other.dtype == x.dtype, f"the input is {x.dtype}, {name} {other.dtype}")
    if "the gradient" in activations:
        got, expected = activations["the gradient"].shape, (x.shape[0], conv.weight[0], *conv.output_size(x))
        _require(got == expected, f"a gradient of shape {tuple(got)} does not belong to an input of {tuple(x.shape)}")
    _require(len(pattern) in (2, 5), f"a pattern is five tensors, got {len(pattern)}")
    for part in pattern:
        right = part.dtype == torch.int32 and part.is_contiguous() and part.dim() == 1
        _require(right, f"a pattern is contiguous rows of int32, got {part.dtype} {tuple(part.shape)}")
    count = len(pattern[1]) * conv.block
    _require(max(count, conv.length) < _LIMIT, f"weight {conv.weight} has more positions than an int32 counts")
    if values is not None:
        _require(values.shape == (count,), f"expected {count} values, got {tuple(values.shape)}")
    if bias is not None:
        right = bias.shape == (conv.weight[0],)
        _require(right, f"expected a bias of {conv.weight[0]} channels, got {tuple(bias.shape)}")


def _require_starts(starts: Tensor, rows: int, count: int) -> None:
    _require(len(starts) == rows + 1, f"expected {rows} rows in the pattern, got {len(starts) - 1}")
    ascending = int(starts[0]) == 0 and int(starts[-1]) == count and bool((starts.diff() >= 0).all())
    _require(ascending, f"the rows of the pattern do not start in order between 0 and {count}")


def _require_within(numbers: Tensor, low: int, high: int, problem: str) -> None:
    inside = numbers.numel() == 0 or (int(numbers.min()) >= low and int(numbers.max()) < high)
    _require(inside, f"the pattern has {problem}")


def _require(right: bool, problem: str) -> None:
    if not right:
        raise ValueError(f"sparse operators: {problem}")
