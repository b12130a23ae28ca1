// A convolution in which each output channel reads one input channel. A strip of that channel's slots fits in the
// first-level cache, so channels pass one by one, each with the few taps that are its own.
#pragma once

#include <ATen/Parallel.h>

#include "convolution.h"
#include "panels.h"

namespace fxsparse {

inline bool is_depthwise(const Geometry& g) {
  return g.in_per_group() == 1 && g.groups > 1;
}

template <typename T>
void depthwise(
    const Geometry& g, const T* x, const Strides& x_strides, const Rows& weight, int64_t count, const T* values,
    const Finish<T>& finish, T* y, const Strides& y_strides) {
  constexpr int64_t strip = 2048, block = widest<1> * lanes<T>;
  const Activation<const T> source{x, x_strides, input_parts(g), g.in_channels};
  const int64_t columns = g.columns(), planes = g.planes.size(), reach = g.last() - g.first();
  const int64_t strips = (columns + strip - 1) / strip, per_group = g.out_channels / g.groups;
  const int64_t pitch = Panel<T>(0, strip + reach).pitch;
  TORCH_CHECK_VALUE(all_within(weight.columns, count, 0, g.row_length()),
                    "the pattern has columns outside of rows of ", g.row_length(), " positions");
  check_offsets(planes, pitch);
  const auto reading = reading_offsets(g, pitch, 1);
  std::vector<int32_t> offsets(count);
  for (int64_t p = 0; p < count; ++p) offsets[p] = reading[weight.columns[p]];
  for (int64_t index = 0; index < strips; ++index) {
    const int64_t from = index * strip, to = std::min(columns, from + strip);
    std::vector<std::vector<Run>> runs(planes);
    std::vector<std::vector<Move>> fills(planes), stores;
    for (int64_t plane = 0; plane < planes; ++plane) {
      const Part& part = source.parts[plane];
      runs[plane] = runs_between(g, x_strides, part, from + g.first(), to + g.last());
      if (part.column_step == 1) fills[plane] = filling<T>(from + g.first(), to + g.last(), runs[plane], source.extent(g));
    }
    for (int64_t column = from; column < to; column += block) {
      stores.push_back(storing<T>(
          column, runs_between(g, y_strides, output_part(g), column, std::min(to, column + block))));
    }
    at::parallel_for(0, g.out_channels, 1, [&](int64_t begin, int64_t end) {
      const Panel<T> panel(planes, strip + reach), sums(1, block + lanes<T>);
      int64_t packed = -1;
      for (int64_t channel = begin; channel < end; ++channel) {
        const int64_t own = channel / per_group;
        const T* pixels = x + own * x_strides.channel;
        for (int64_t plane = 0; plane < planes && packed != own; ++plane) {
          if (source.parts[plane].column_step == 1) {
            fill(panel.row(plane), fills[plane], pixels);
          } else {
            fill(panel.row(plane), from + g.first(), to + g.last(), runs[plane], pixels, source.parts[plane].column_step);
          }
        }
        packed = own;
        const int64_t start = weight.starts[channel], stop = weight.starts[channel + 1];
        for (int64_t column = from, i = 0; column < to; column += block, ++i) {
          const int64_t vectors = std::min<int64_t>(widest<1>, (to - column + lanes<T> - 1) / lanes<T>);
          with_width<widest<1>>(vectors, [&](auto wide) {
            multiply<T, 1, decltype(wide)::value>(
                panel.row(0) + (column - from), offsets.data() + start, values + start, stop - start,
                finish.bias == nullptr ? Start::zero : Start::numbers, finish.bias_of(channel), 0, Ending<T>(),
                sums.row(0), 0);
          });
          store(sums.row(0), stores[i], finish, channel * y_strides.channel, y);
        }
      }
    });
  }
}

}  // namespace fxsparse
