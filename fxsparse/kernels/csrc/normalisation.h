// Batch normalisation in train mode with the sum and the ReLU that follow it: three passes over a channel forward and two
// back, in place of the seven and five of the separate operations. Channels are rows of contiguous pixels.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "product.h"

namespace fxsparse {

// The sum over n of f(n), a vector at a time; the rest of fewer than a vector's lanes is masked by `count`.
template <typename T, typename F>
inline double sum_of(int64_t length, const F& f) {
  constexpr int64_t chunk = 256;  // vectors that are summed in single precision
  double total = 0;
  for (int64_t start = 0; start < length; start += chunk * lanes<T>) {
    Vec<T> sums[2] = {Vec<T>(T(0)), Vec<T>(T(0))};
    const int64_t end = std::min(length, start + chunk * lanes<T>);
    int64_t n = start;
    for (; n + 2 * lanes<T> <= end; n += 2 * lanes<T>) {
      sums[0] = sums[0] + f(n, lanes<T>);
      sums[1] = sums[1] + f(n + lanes<T>, lanes<T>);
    }
    for (; n < end; n += lanes<T>) {
      const int64_t count = std::min(lanes<T>, end - n);
      sums[0] = sums[0] + Vec<T>::set(Vec<T>(T(0)), f(n, count), count);
    }
    alignas(64) T parts[lanes<T>];
    (sums[0] + sums[1]).store(parts);
    for (T part : parts) total += part;
  }
  return total;
}

template <typename T>
struct NormForward {
  const T *x, *residual, *weight, *bias;
  T *y, *mean, *rstd;
  bool relu;
  double eps;
  int64_t channels, length;

  void run() const {
    at::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) channel(c);
    });
  }

  void channel(int64_t c) const {
    const T* in = x + c * length;
    const auto load = [&](const T* from, int64_t n, int64_t count) { return Vec<T>::loadu(from + n, count); };
    const double average = sum_of<T>(length, [&](int64_t n, int64_t k) { return load(in, n, k); }) / length;
    const Vec<T> center(static_cast<T>(average));
    const double spread = sum_of<T>(length, [&](int64_t n, int64_t k) {
      const Vec<T> distance = load(in, n, k) - center;
      return distance * distance;
    });
    mean[c] = static_cast<T>(average);
    rstd[c] = static_cast<T>(1 / std::sqrt(spread / length + eps));
    const Vec<T> scale(rstd[c] * (weight == nullptr ? T(1) : weight[c])), shift(bias == nullptr ? T(0) : bias[c]);
    const Vec<T> zero(T(0));
    for (int64_t n = 0; n < length; n += lanes<T>) {
      const int64_t count = std::min(lanes<T>, length - n);
      Vec<T> out = at::vec::fmadd(load(in, n, count) - center, scale, shift);
      if (residual != nullptr) out = out + load(residual + c * length, n, count);
      if (relu) out = at::vec::maximum(out, zero);
      out.store(y + c * length + n, count);
    }
  }
};

template <typename T>
struct NormBackward {
  const T *dy, *x, *y, *weight, *mean, *rstd;
  T *dx, *dresidual, *dweight, *dbias;
  bool relu;
  int64_t channels, length;

  void run() const {
    at::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) channel(c);
    });
  }

  void channel(int64_t c) const {
    const T *in = x + c * length, *out = y + c * length, *up = dy + c * length;
    const Vec<T> zero(T(0)), center(mean[c]);
    const auto gradient = [&](int64_t n, int64_t k) {
      const Vec<T> g = Vec<T>::loadu(up + n, k);
      return relu ? Vec<T>::blendv(g, zero, Vec<T>::loadu(out + n, k) <= zero) : g;
    };
    const double sum = sum_of<T>(length, gradient);
    const double product = sum_of<T>(length, [&](int64_t n, int64_t k) {
      return gradient(n, k) * (Vec<T>::loadu(in + n, k) - center);
    });
    dweight[c] = static_cast<T>(product * rstd[c]);
    dbias[c] = static_cast<T>(sum);
    const Vec<T> scale(rstd[c] * (weight == nullptr ? T(1) : weight[c]));
    const Vec<T> average(static_cast<T>(sum / length));
    const Vec<T> slope(static_cast<T>(product / length * rstd[c] * rstd[c]));
    for (int64_t n = 0; n < length; n += lanes<T>) {
      const int64_t count = std::min(lanes<T>, length - n);
      const Vec<T> g = gradient(n, count);
      if (dresidual != nullptr) g.store(dresidual + c * length + n, count);
      const Vec<T> distance = Vec<T>::loadu(in + n, count) - center;
      ((g - average - distance * slope) * scale).store(dx + c * length + n, count);
    }
  }
};

}  // namespace fxsparse
