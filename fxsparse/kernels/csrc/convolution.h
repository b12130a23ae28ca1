// A convolution with a sparse weight, and the gradient of its input.
#pragma once

#include <ATen/Parallel.h>

#include <memory>
#include <utility>

#include "checks.h"
#include "rows_product.h"

namespace fxsparse {

// A weight of which only some positions are stored: compressed rows of blocks of `block` consecutive output channels.
// `columns` index the flattened row of the weight, (input channel of the group, tap). The last block may be short.
struct Rows {
  const int32_t* starts;
  const int32_t* columns;
};

// The same positions column by column: of flattened column k of group g, entries t_starts[g * row_length + k] and on;
// each has its block row and its place among the values.
struct Columns {
  const int32_t* starts;
  const int32_t* rows;
  const int32_t* places;
};

// Where each position of a weight's flattened row reads in panels of input rows with a given pitch, in tiles of so many
// channels.
inline std::vector<int32_t> reading_offsets(const Geometry& g, int64_t pitch, int64_t channels) {
  const int64_t taps = g.taps(), planes = g.planes.size();
  std::vector<int32_t> offsets(g.row_length());
  for (int64_t k = 0; k < g.row_length(); ++k)
    offsets[k] = static_cast<int32_t>((k / taps % channels * planes + g.plane_of[k % taps]) * pitch + g.shift_of[k % taps] - g.first());
  return offsets;
}

inline void gather_offsets(
    const std::vector<int32_t>& reading, const int32_t* __restrict columns, int64_t count, int32_t* __restrict offsets) {
  const int32_t* __restrict table = reading.data();
  for (int64_t p = 0; p < count; ++p) offsets[p] = table[columns[p]];
}

inline std::vector<Part> input_parts(const Geometry& g) {
  std::vector<Part> parts;
  for (int64_t plane : g.planes) parts.push_back(plane_part(g, plane));
  return parts;
}

// y = convolution of x, finished. With `pattern`, the tensors of the weight's starts and columns, the plan is remembered.
template <typename T, int R>
void forward(
    const Geometry& g, const T* x, const Strides& x_strides, const Rows& weight, int64_t count, const T* values,
    const Finish<T>& finish, T* y, const Strides& y_strides, const at::Tensor* pattern) {
  const Activation<const T> source{x, x_strides, input_parts(g), g.in_channels};
  const Activation<T> result{y, y_strides, {output_part(g)}, g.out_channels};
  const auto prepare = [&](int64_t pitch, const Tiling& tiling) {
    TORCH_CHECK_VALUE(all_within(weight.columns, count, 0, g.row_length()),
                      "the pattern has columns outside of rows of ", g.row_length(), " positions");
    auto plan = std::make_shared<Plan>(count, tiling.narrow);
    const auto reading = reading_offsets(g, pitch, tiling.channels);
    if (tiling.narrow) {
      for (int64_t p = 0; p < count; ++p) plan->narrow[p] = static_cast<uint16_t>(reading[weight.columns[p]]);
    } else {
      for (int64_t p = 0; p < count; ++p) plan->wide[p] = reading[weight.columns[p]];
    }
    if (tiling.tiles == 1) return plan;
    plan->ends.resize(g.out_channels / R * tiling.tiles);
    for (int64_t i = 0; i < static_cast<int64_t>(plan->ends.size()); ++i) {
      const int64_t row = i / tiling.tiles, stop = (i % tiling.tiles + 1) * tiling.channels * g.taps();
      const int32_t* from = weight.columns + (i % tiling.tiles == 0 ? weight.starts[row] : plan->ends[i - 1]);
      plan->ends[i] =
          static_cast<int32_t>(std::lower_bound(from, weight.columns + weight.starts[row + 1], stop) - weight.columns);
    }
    return plan;
  };
  const Prepare remembered = [&](int64_t pitch, const Tiling& tiling) -> std::shared_ptr<const Plan> {
    if (pattern == nullptr) return prepare(pitch, tiling);
    const Plans::Key key{pitch * 2 + tiling.narrow, tiling.channels, g.taps(), g.wide.slots, g.high.kernel, g.high.stride, g.wide.stride,
                         g.high.padding * (int64_t{1} << 32) + g.wide.padding, g.high.dilation * (int64_t{1} << 32) + g.wide.dilation, R};
    auto plan = Plans::all().find(pattern[0], pattern[1], key);
    if (plan == nullptr) Plans::all().put(pattern[0], pattern[1], key, plan = prepare(pitch, tiling));
    return plan;
  };
  product<T, R>(g, source, result, finish, weight.starts, count, remembered, values, g.first(), g.last(), g.groups);
}

// y = the weight times one vector, finished.
template <typename T, int R>
void forward_vector(
    const T* x, const Rows& weight, int64_t outputs, const T* values, const Finish<T>& finish, T* y) {
  constexpr int64_t grain = 256;  // rows that are worth a thread
  at::parallel_for(0, outputs / R, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t start = weight.starts[row];
      multiply_vector<T, R>(x, weight.columns + start, values + start * R, weight.starts[row + 1] - start, y + row * R);
    }
    for (int64_t i = begin * R; i < end * R; ++i) {
      if (finish.bias != nullptr) y[i] += finish.bias[i];
      if (finish.limited && y[i] < finish.low) y[i] = finish.low;  // both comparisons are false for NaN, which stays
      if (finish.limited && y[i] > finish.high) y[i] = finish.high;
    }
  });
}

// dx = the gradient of the input. Where it is not covered by the planes that are read, `dx` holds zeros already.
template <typename T, int R>
void input_gradient(
    const Geometry& g, const T* dy, const Strides& dy_strides, const Columns& weight, int64_t count, const T* values,
    T* dx, const Strides& dx_strides) {
  const int64_t taps = g.taps(), planes = g.planes.size();
  const int64_t rows = g.in_channels * planes;
  const int64_t outputs_per_group = g.out_channels / g.groups;
  std::vector<int32_t> starts(rows + 1);
  std::vector<T> turned(count * R);
  // The rows of the turned weight: (input channel, plane), with an entry for each output channel.
  const auto prepare = [&](int64_t pitch, const Tiling& tiling) -> std::shared_ptr<const Plan> {
    auto plan = std::make_shared<Plan>(count * R, tiling.narrow);
    if (tiling.tiles > 1) plan->ends.resize(rows * tiling.tiles);
    std::vector<int32_t> at(taps);
    int64_t next = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t channel = row / planes, first = channel / g.in_per_group() * outputs_per_group;
      const int32_t* begin = weight.starts + channel * taps;
      std::copy(begin, begin + taps, at.begin());
      for (int64_t tile = 0; tile < tiling.tiles; ++tile) {
        const bool last = tile == tiling.tiles - 1;
        const int64_t first_line = first + tile * tiling.channels;
        for (int64_t tap = 0; tap < taps; ++tap) {
          if (g.plane_of[tap] != row % planes) continue;
          const auto shift = static_cast<int32_t>(g.last() - g.shift_of[tap]);
          int64_t p = at[tap];
          for (; p < begin[tap + 1]; ++p) {
            const int64_t line = weight.rows[p] * R - first_line;
            if (!last && line >= tiling.channels) break;
            for (int r = 0; r < R; ++r, ++next) {
              const auto offset = static_cast<int32_t>((line + r) * pitch) + shift;
              tiling.narrow ? plan->narrow[next] = static_cast<uint16_t>(offset) : plan->wide[next] = offset;
              turned[next] = values[static_cast<int64_t>(weight.places[p]) * R + r];
            }
          }
          at[tap] = static_cast<int32_t>(p);
        }
        if (tiling.tiles > 1) plan->ends[row * tiling.tiles + tile] = static_cast<int32_t>(next);
      }
      starts[row + 1] = static_cast<int32_t>(next);
    }
    return plan;
  };
  const Activation<const T> source{dy, dy_strides, {output_part(g)}, g.out_channels};
  const Activation<T> result{dx, dx_strides, input_parts(g), g.in_channels};
  product<T, 1>(g, source, result, Finish<T>(), starts.data(), count * R, prepare, turned.data(), -g.last(),
                -g.first(), g.groups);
}

}  // namespace fxsparse
