// The gradient of the stored weights of a convolution.
#pragma once

#include <memory>

#include "convolution.h"
#include "exact.h"

namespace fxsparse {

// dvalues += the gradient of the stored weights: dot products of output gradients with input rows.
//
// Tiles of input channels by columns stay in the cache, wide enough that summing up a vector does not show. Columns of a
// pattern's row ascend, so that each tile reads a stretch of it; `cursors` hold where the next tile's begins.
template <typename T, int R>
void weight_gradient(
    const Geometry& g, const T* x, const Strides& x_strides, const T* dy, const Strides& dy_strides, const Rows& weight,
    int64_t count, T* dvalues) {
  const Activation<const T> input{x, x_strides, input_parts(g), g.in_channels};
  const Activation<const T> gradient{dy, dy_strides, {output_part(g)}, g.out_channels};
  const int64_t columns = g.columns(), threads = at::get_num_threads();
  const int64_t rows = g.out_channels / R, rows_per_group = rows / g.groups, reach = g.last() - g.first();
  if (columns == 0 || rows == 0) return;
  const int64_t planes = g.planes.size(), taps = g.taps();
  constexpr int64_t bytes = 512 * 1024, wide = 64 * lanes<T>;
  const int64_t share = (columns + threads - 1) / threads;
  const int64_t width = std::min(wide, (share + 2 * lanes<T> - 1) / (2 * lanes<T>) * (2 * lanes<T>));
  const int64_t fit = bytes / static_cast<int64_t>(sizeof(T)) / (width + reach) / planes;
  const int64_t tile = g.groups > 1 ? g.in_channels : std::min(std::max<int64_t>(fit, 16), g.in_channels);
  const int64_t panels = (columns + width - 1) / width;
  const int64_t pitch = Panel<T>(0, width + reach).pitch;
  check_offsets(input.rows(), pitch);
  const auto reading = reading_offsets(g, pitch, g.in_channels);
  const auto offsets = std::make_unique_for_overwrite<int32_t[]>(count);
  gather_offsets(reading, weight.columns, count, offsets.get());
  // Each thread sums over columns of its own; the sums are added in a fixed order.
  const int64_t shares = std::min(threads, panels);
  std::vector<std::vector<T>> sums(shares);
  at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    const Panel<T> panel(tile * planes, width + reach), gradients(R, width);
    std::vector<int32_t> cursors(rows);
    for (int64_t thread = begin; thread < end; ++thread) {
      sums[thread].assign(thread == 0 ? 0 : count * R, T(0));
      T* const dots = thread == 0 ? dvalues : sums[thread].data();
      for (int64_t index = panels * thread / shares; index < panels * (thread + 1) / shares; ++index) {
        const int64_t from = index * width;
        const auto runs = runs_between(g, dy_strides, output_part(g), from, from + width);
        const auto fills = filling<T>(from, from + width, runs, gradient.extent(g));
        const int64_t unit = 2 * lanes<T>, length = (std::min(columns - from, width) + unit - 1) / unit * unit;
        std::copy(weight.starts, weight.starts + rows, cursors.begin());
        for (int64_t channel = 0; channel < g.in_channels; channel += tile) {
          const int64_t stop_channel = std::min(channel + tile, g.in_channels);
          pack(g, input, channel * planes, stop_channel * planes, from + g.first(), from + width + g.last(), panel);
          const bool last = stop_channel == g.in_channels;
          const T* const origin = panel.row(0) - channel * planes * panel.pitch;
          for (int64_t row = 0; row < rows; ++row) {
            int64_t p = cursors[row];
            int64_t stop = weight.starts[row + 1];
            if (!last) {
              stop = std::lower_bound(weight.columns + p, weight.columns + stop, stop_channel * taps) - weight.columns;
            }
            cursors[row] = static_cast<int32_t>(stop);
            if (p == stop) continue;
            const T* y = gradients.row(0);
            if (R == 1 && runs.size() == 1 && runs[0].length == width) {
              y = dy + row * dy_strides.channel + runs[0].offset;
            } else {
              for (int r = 0; r < R; ++r)
                fill(gradients.row(r), fills, dy + (row * R + r) * dy_strides.channel);
            }
            const T* lines = origin + row / rows_per_group * (input.rows() / g.groups) * panel.pitch;
            constexpr int J = R == 1 ? 4 : R == 2 ? 4 : R == 4 ? 2 : 1;
            for (; p + J <= stop; p += J)
              dot<T, R, J>(y, gradients.pitch, lines, offsets.get() + p, length, dots + p * R);
            for (; p < stop; ++p)
              dot<T, R, 1>(y, gradients.pitch, lines, offsets.get() + p, length, dots + p * R);
          }
        }
      }
    }
  });
  for (int64_t thread = 1; thread < shares; ++thread)
    for (int64_t i = 0; i < count * R; ++i) dvalues[i] += sums[thread][i];
  make_exact<T, R>(g, x, x_strides, dy, dy_strides, weight.starts, weight.columns, dvalues);
}

}  // namespace fxsparse
