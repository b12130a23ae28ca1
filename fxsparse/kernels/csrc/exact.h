// Weight gradients that came out infinite or NaN, computed again from pixels alone.
//
// Slots without a pixel hold zeros. Zero times an infinite or NaN number of another place is NaN, so such numbers reach
// weights whose taps never read them. Dense convolutions know no slots: there, only pixels that a tap reads count.
#pragma once

#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

#include "geometry.h"

namespace fxsparse {

// A stored weight: its output channel, its flattened input position, and its place among the values.
struct Place {
  int64_t row, column, place;
};

template <typename T>
T exact_weight_gradient(
    const Geometry& g, const T* x, const Strides& x_strides, const T* dy, const Strides& dy_strides, const Place& at) {
  const int64_t group = at.row / (g.out_channels / g.groups), tap = at.column % g.taps();
  const int64_t channel = group * g.in_per_group() + at.column / g.taps();
  const int64_t down = tap / g.wide.kernel * g.high.dilation - g.high.padding;
  const int64_t right = tap % g.wide.kernel * g.wide.dilation - g.wide.padding;
  T sum = 0;
  for (int64_t image = 0; image < g.images; ++image) {
    for (int64_t i = 0; i < g.high.output; ++i) {
      const int64_t m = i * g.high.stride + down;
      if (m < 0 || m >= g.high.input) continue;
      const T* pixels = x + image * x_strides.image + channel * x_strides.channel + m * x_strides.row;
      const T* gradients = dy + image * dy_strides.image + at.row * dy_strides.channel + i * dy_strides.row;
      for (int64_t j = 0; j < g.wide.output; ++j) {
        const int64_t n = j * g.wide.stride + right;
        if (n >= 0 && n < g.wide.input) sum += gradients[j] * pixels[n];
      }
      if (std::isnan(sum)) return sum;
    }
  }
  return sum;
}

// Replaces each of `dvalues` that is not finite.
template <typename T, int R>
void make_exact(
    const Geometry& g, const T* x, const Strides& x_strides, const T* dy, const Strides& dy_strides,
    const int32_t* starts, const int32_t* columns, T* dvalues) {
  std::vector<Place> places;
  for (int64_t row = 0; row < g.out_channels / R; ++row)
    for (int64_t p = starts[row]; p < starts[row + 1]; ++p)
      for (int r = 0; r < R; ++r)
        if (!std::isfinite(dvalues[p * R + r])) places.push_back({row * R + r, columns[p], p * R + r});
  at::parallel_for(0, static_cast<int64_t>(places.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      dvalues[places[i].place] = exact_weight_gradient(g, x, x_strides, dy, dy_strides, places[i]);
  });
}

}  // namespace fxsparse
