// Batch normalisation in train mode with the sum and the ReLU that follow it: three passes over a channel forward and two
// back, in place of the seven and five of the separate operations. Channels are rows of contiguous pixels.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "product.h"

namespace fxsparse {

// The sums over n of the K numbers that f(n, count) gives for `count` positions from n on, vectors each.
template <typename T, int K, typename F>
inline std::array<double, K> sums_of(int64_t length, const F& f) {
  constexpr int64_t chunk = 256;  // vectors that are summed in single precision
  std::array<double, K> total{};
  for (int64_t start = 0; start < length; start += chunk * lanes<T>) {
    Vec<T> sums[2][K];
    for (int i = 0; i < 2 * K; ++i) sums[i / K][i % K] = Vec<T>(T(0));
    const int64_t end = std::min(length, start + chunk * lanes<T>);
    int64_t n = start;
    for (; n + 2 * lanes<T> <= end; n += 2 * lanes<T>) {
      const auto even = f(n, lanes<T>), odd = f(n + lanes<T>, lanes<T>);
      for (int k = 0; k < K; ++k) {
        sums[0][k] = sums[0][k] + even[k];
        sums[1][k] = sums[1][k] + odd[k];
      }
    }
    for (; n < end; n += lanes<T>) {
      const int64_t count = std::min(lanes<T>, end - n);
      const auto rest = f(n, count);
      for (int k = 0; k < K; ++k) sums[0][k] = sums[0][k] + Vec<T>::set(Vec<T>(T(0)), rest[k], count);
    }
    alignas(64) T parts[lanes<T>];
    for (int k = 0; k < K; ++k) {
      (sums[0][k] + sums[1][k]).store(parts);
      for (T part : parts) total[k] += part;
    }
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
    using One = std::array<Vec<T>, 1>;
    const double average = sums_of<T, 1>(length, [&](int64_t n, int64_t k) { return One{load(in, n, k)}; })[0] / length;
    const Vec<T> center(static_cast<T>(average));
    const double spread = sums_of<T, 1>(length, [&](int64_t n, int64_t k) {
      const Vec<T> distance = load(in, n, k) - center;
      return One{distance * distance};
    })[0];
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
    const auto [sum, product] = sums_of<T, 2>(length, [&](int64_t n, int64_t k) {
      const Vec<T> g = gradient(n, k);
      return std::array<Vec<T>, 2>{g, g * (Vec<T>::loadu(in + n, k) - center)};
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
