// Pooling of activations whose rows of pixels are contiguous, for inference.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "product.h"

namespace fxsparse {

// The maximum over windows, of the rows first and then along them; NaN wins, as in torch.
template <typename T>
struct MaxPool {
  int64_t height, width, output_height, output_width;
  int64_t kernel[2], stride[2], padding[2];

  // A row of `width` numbers between `padding` times the lowest one, and room for whole vectors.
  int64_t row_length() const { return width + 2 * padding[1] + kernel[1] + 2 * lanes<T>; }

  // `rows` has room for two rows.
  void plane(const T* x, T* y, T* rows) const {
    constexpr T lowest = -std::numeric_limits<T>::infinity();
    T *const down = rows, *const along = rows + row_length();
    std::fill(down, down + row_length(), lowest);
    for (int64_t i = 0; i < output_height; ++i) {
      const int64_t top = i * stride[0] - padding[0];
      const int64_t first = std::max<int64_t>(top, 0), last = std::min(top + kernel[0], height);
      for (int64_t n = 0; n < width; n += lanes<T>) {
        const int64_t count = std::min(lanes<T>, width - n);
        Vec<T> most = Vec<T>::loadu(x + first * width + n, count);
        for (int64_t m = first + 1; m < last; ++m) most = at::vec::maximum(most, Vec<T>::loadu(x + m * width + n, count));
        most.store(down + padding[1] + n, count);
      }
      const int64_t reach = (output_width - 1) * stride[1] + 1;
      for (int64_t n = 0; n < reach; n += lanes<T>) {
        Vec<T> most = Vec<T>::loadu(down + n);
        for (int64_t k = 1; k < kernel[1]; ++k) most = at::vec::maximum(most, Vec<T>::loadu(down + n + k));
        most.store(along + n);
      }
      T* const to = y + i * output_width;
      if (stride[1] == 2) {
        for (int64_t j = 0; j < output_width; ++j) to[j] = along[2 * j];
      } else {
        for (int64_t j = 0; j < output_width; ++j) to[j] = along[j * stride[1]];
      }
    }
  }
};

// The mean of `count` numbers side by side.
template <typename T>
inline T mean_of(const T* x, int64_t count) {
  Vec<T> sums[2] = {Vec<T>(T(0)), Vec<T>(T(0))};
  int64_t n = 0;
  for (; n + 2 * lanes<T> <= count; n += 2 * lanes<T>)
    for (int s = 0; s < 2; ++s) sums[s] = sums[s] + Vec<T>::loadu(x + n + s * lanes<T>);
  alignas(64) T parts[lanes<T>];
  (sums[0] + sums[1]).store(parts);
  for (int64_t half = lanes<T> / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) parts[l] += parts[l + half];
  T sum = parts[0];
  for (; n < count; ++n) sum += x[n];
  return sum / static_cast<T>(count);
}

}  // namespace fxsparse
