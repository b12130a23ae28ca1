// What every operator relies on: the loops themselves check nothing, so nothing wrong may reach them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

#include "geometry.h"

namespace fxsparse {

using at::IntArrayRef;
using at::Tensor;

struct Settings {
  IntArrayRef weight, stride, padding, dilation;
  int64_t groups, block;

  int64_t in_channels() const { return weight[1] * groups; }
  int64_t row_length() const { return weight[1] * weight[2] * weight[3]; }

  void check() const {
    TORCH_CHECK_VALUE(
        weight.size() == 4 && *std::min_element(weight.begin(), weight.end()) >= 0 && weight[2] > 0 && weight[3] > 0,
        "expected the shape of a weight (out, in per group, height, width), got ", weight);
    TORCH_CHECK_VALUE(
        stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
        "stride, padding and dilation are two numbers each, got ", stride, ", ", padding, " and ", dilation);
    TORCH_CHECK_VALUE(stride[0] > 0 && stride[1] > 0, "a stride is at least 1, got ", stride);
    TORCH_CHECK_VALUE(dilation[0] > 0 && dilation[1] > 0, "a dilation is at least 1, got ", dilation);
    TORCH_CHECK_VALUE(padding[0] >= 0 && padding[1] >= 0, "a padding is at least 0, got ", padding);
    TORCH_CHECK_VALUE(
        block == 1 || block == 2 || block == 4 || block == 8, "no kernel for blocks of ", block,
        " output channels; 1, 2, 4 and 8 have one");
    TORCH_CHECK_VALUE(
        groups > 0 && weight[0] % (block * groups) == 0, "blocks of ", block, " do not divide ", weight[0],
        " output channels in ", groups, " groups");
  }

  Geometry geometry(int64_t images, int64_t height, int64_t width) const {
    return Geometry(
        images, in_channels(), weight[0], groups, Axis(height, weight[2], stride[0], padding[0], dilation[0]),
        Axis(width, weight[3], stride[1], padding[1], dilation[1]));
  }
};

inline void check_activation(const char* name, const Tensor& x, int64_t channels) {
  TORCH_CHECK_VALUE(
      x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, "sparse operators take float32 and float64, ",
      name, " is ", x.scalar_type());
  TORCH_CHECK_VALUE(
      x.layout() == at::kStrided && x.is_cpu(), "sparse operators take dense tensors on the CPU, ", name, " is ",
      x.layout(), " on ", x.device());
  TORCH_CHECK_VALUE(
      x.dim() == 4 && x.size(1) == channels, "expected ", name, " (images, ", channels, ", height, width), got ",
      x.sizes());
}

// A second operand: the dtype of the first.
inline void check_alike(const char* name, const Tensor& other, const Tensor& x) {
  TORCH_CHECK_VALUE(
      other.scalar_type() == x.scalar_type() && other.is_cpu() && other.layout() == at::kStrided, "the input is ",
      x.scalar_type(), " on the CPU, ", name, " ", other.scalar_type(), " on ", other.device());
}

// Whether numbers lie in [low, high): their distances from `low` as unsigned, those before it being far beyond. As many
// maxima are kept as fill the registers, which doubles the speed.
inline bool all_within(const int32_t* numbers, int64_t count, int64_t low, int64_t high) {
  constexpr int64_t at_once = 64;
  uint32_t most[at_once] = {};
  int64_t i = 0;
  for (; i + at_once <= count; i += at_once)
    for (int64_t l = 0; l < at_once; ++l)
      most[l] = std::max(most[l], static_cast<uint32_t>(numbers[i + l]) - static_cast<uint32_t>(low));
  for (; i < count; ++i) most[0] = std::max(most[0], static_cast<uint32_t>(numbers[i]) - static_cast<uint32_t>(low));
  return count == 0 || static_cast<int64_t>(*std::max_element(most, most + at_once)) < high - low;
}

inline void check_starts(const char* name, const Tensor& starts, int64_t rows, int64_t count) {
  TORCH_CHECK_VALUE(starts.numel() == rows + 1, "expected ", rows, " ", name, " in the pattern, got ", starts.numel() - 1);
  const int32_t* at = starts.const_data_ptr<int32_t>();
  int32_t descents = 0;
  for (int64_t row = 0; row < rows; ++row) descents += at[row] > at[row + 1];
  TORCH_CHECK_VALUE(at[0] == 0 && at[rows] == count && descents == 0, "the ", name, " of the pattern do not start in order between 0 and ", count);
}

// Patterns come as plain tensors, from files as well, so each call looks through the one it reads: a fraction of the
// time of the products. Whether rows and columns list the same positions is for `SparsePattern` to say.
//
// `columns` is false where what reads them looks through them.
inline void check_pattern(const Settings& s, at::TensorList pattern, bool by_columns, bool columns = true) {
  TORCH_CHECK_VALUE(
      pattern.size() == 5 || (pattern.size() == 2 && !by_columns), "a pattern is five tensors, got ", pattern.size());
  for (const Tensor& part : pattern) {
    TORCH_CHECK_VALUE(
        part.scalar_type() == at::kInt && part.is_cpu() && part.layout() == at::kStrided && part.is_contiguous() &&
            part.dim() == 1,
        "a pattern is contiguous rows of int32 on the CPU, got ", part.scalar_type(), " ", part.sizes(), " on ",
        part.device());
  }
  const int64_t count = pattern[1].numel(), length = s.row_length(), rows = s.weight[0] / s.block;
  TORCH_CHECK_VALUE(
      count <= std::numeric_limits<int32_t>::max() / s.block && length <= std::numeric_limits<int32_t>::max(),
      "a weight of shape ", s.weight, " has more positions than an int32 counts");
  if (!by_columns) {
    check_starts("block rows", pattern[0], rows, count);
    TORCH_CHECK_VALUE(
        !columns || all_within(pattern[1].const_data_ptr<int32_t>(), count, 0, length), "the pattern has columns outside of rows of ",
        length, " positions");
    return;
  }
  check_starts("columns", pattern[2], length * s.groups, count);
  TORCH_CHECK_VALUE(
      pattern[3].numel() == count && pattern[4].numel() == count, "the pattern lists ", count, " blocks by rows and ",
      pattern[3].numel(), " by columns");
  const int32_t* starts = pattern[2].const_data_ptr<int32_t>();
  const int32_t* block_rows = pattern[3].const_data_ptr<int32_t>();
  bool within = all_within(pattern[4].const_data_ptr<int32_t>(), count, 0, count);
  for (int64_t group = 0; group < s.groups; ++group) {
    const int64_t begin = starts[group * length], end = starts[(group + 1) * length];
    within &= all_within(block_rows + begin, end - begin, rows / s.groups * group, rows / s.groups * (group + 1));
  }
  TORCH_CHECK_VALUE(within, "the pattern has blocks outside of ", rows, " block rows in ", s.groups, " groups");
}

// The weight gradient goes through each row in stretches, from one tile of input channels to the next.
inline void check_ascending(at::TensorList pattern) {
  const int32_t* starts = pattern[0].const_data_ptr<int32_t>();
  const int32_t* columns = pattern[1].const_data_ptr<int32_t>();
  int32_t descents = 0;
  for (int64_t row = 0; row + 1 < pattern[0].numel(); ++row)
    for (int64_t p = starts[row] + 1; p < starts[row + 1]; ++p) descents += columns[p] <= columns[p - 1];
  TORCH_CHECK_VALUE(descents == 0, "the pattern has rows whose columns do not ascend");
}

inline void check_values(const Settings& s, const Tensor& x, const Tensor& values, at::TensorList pattern) {
  TORCH_CHECK_VALUE(
      values.dim() == 1 && values.numel() == pattern[1].numel() * s.block, "expected ", pattern[1].numel() * s.block,
      " values, got ", values.sizes());
  check_alike("the values", values, x);
}

inline void check_bias(const Settings& s, const std::optional<Tensor>& bias, const Tensor& x) {
  if (!bias.has_value()) return;
  TORCH_CHECK_VALUE(
      bias->dim() == 1 && bias->numel() == s.weight[0], "expected a bias of ", s.weight[0], " channels, got ",
      bias->sizes());
  check_alike("the bias", *bias, x);
}

inline void check_gradient(const Settings& s, const Tensor& dy, const Tensor& x) {
  const Geometry g = s.geometry(x.size(0), x.size(2), x.size(3));
  TORCH_CHECK_VALUE(
      dy.size(0) == x.size(0) && dy.size(2) == g.output_height && dy.size(3) == g.output_width, "a gradient of shape ",
      dy.sizes(), " does not belong to an input of shape ", x.sizes());
  check_alike("the gradient", dy, x);
}

}  // namespace fxsparse
