// The three loops that everything else is made of: a sparse row times dense rows, dot products of dense rows,
// and a sparse row times one vector.
//
// Dense rows lie in panels: buffers whose rows are padded to whole vectors, so that no loop here has a tail.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>

namespace fxsparse {

template <typename T>
using Vec = at::vec::Vectorized<T>;

template <typename T>
constexpr int64_t lanes = Vec<T>::size();

// Vectors of one row that are summed at once: enough independent sums to hide the latency of multiply-adds, and as many
// as the registers hold with R rows.
template <int R>
#if defined(CPU_CAPABILITY_AVX512)
constexpr int widest = R == 1 ? 8 : R == 2 ? 8 : R == 4 ? 4 : 2;
#else
constexpr int widest = R == 1 ? 8 : R == 2 ? 4 : R == 4 ? 2 : 1;
#endif

// What is done with whole vectors of sums before they are stored: what is added, with the pitch of y, and bounds.
template <typename T>
struct Ending {
  const T* added = nullptr;
  bool limited = false;
  T low = 0, high = 0;
};

// What sums begin with: nothing, a number for each row, or the sums that are in y already.
enum class Start { zero, numbers, sums };

// y[r * pitch + n] = sum over p of values[p * R + r] * x[offsets[p] + n], for R rows that share a pattern and for the
// V vectors of columns n; `start` gives what the sums begin with. Each x is loaded once for R products. Where there are
// few vectors, two entries are summed side by side, since a multiply-add waits for the one before it.
template <typename T, int R, int V, typename Offset>
inline void multiply(
    const T* x, const Offset* offsets, const T* values, int64_t count, Start begin, const T* start,
    int64_t start_pitch, const Ending<T>& ending, T* y, int64_t pitch) {
  constexpr int S = R * V <= 4 ? 2 : 1;
  Vec<T> sums[S][R][V];
  // Every loop over the sums is unrolled: one that is not would keep them in memory.
  const auto each = [&](const auto& body) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) body(r, v);
  };
  if (begin == Start::sums) {
    each([&](int r, int v) { sums[0][r][v] = Vec<T>::loadu(start + r * start_pitch + v * lanes<T>); });
  } else if (begin == Start::numbers) {
    each([&](int r, int v) { sums[0][r][v] = Vec<T>(start[r]); });
  } else {
    each([&](int r, int v) { sums[0][r][v] = Vec<T>(T(0)); });
  }
  if constexpr (S == 2) each([&](int r, int v) { sums[1][r][v] = Vec<T>(T(0)); });
  const auto add = [&](int s, int64_t p) {
    const T* from = x + offsets[p];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vec<T> column = Vec<T>::loadu(from + v * lanes<T>);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        sums[s][r][v] = at::vec::fmadd(Vec<T>(values[p * R + r]), column, sums[s][r][v]);
    }
  };
  int64_t p = 0;
  for (; p + S <= count; p += S)
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) add(s, p + s);
  for (; p < count; ++p) add(0, p);
  if constexpr (S == 2) each([&](int r, int v) { sums[0][r][v] = sums[0][r][v] + sums[1][r][v]; });
  if (ending.added != nullptr) {
    each([&](int r, int v) { sums[0][r][v] = sums[0][r][v] + Vec<T>::loadu(ending.added + r * pitch + v * lanes<T>); });
  }
  if (ending.limited) {
    const Vec<T> low(ending.low), high(ending.high);
    each([&](int r, int v) { sums[0][r][v] = at::vec::minimum(at::vec::maximum(sums[0][r][v], low), high); });
  }
  each([&](int r, int v) { sums[0][r][v].store(y + r * pitch + v * lanes<T>); });
}

// dots[j * R + r] += sum over n of y[r * pitch + n] * x[offsets[j] + n], for J rows of x at once; n runs to `length`, a
// multiple of twice the lanes. Even and odd vectors are summed side by side.
template <typename T, int R, int J>
inline void dot(const T* y, int64_t pitch, const T* x, const int32_t* offsets, int64_t length, T* dots) {
  constexpr int S = J * R <= 4 ? 2 : 1;
  Vec<T> sums[S][J * R];
#pragma GCC unroll 2
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 8
    for (int i = 0; i < J * R; ++i) sums[s][i] = Vec<T>(T(0));
  for (int64_t n = 0; n < length; n += S * lanes<T>) {
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) {
      const int64_t at = n + s * lanes<T>;
      Vec<T> rows[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) rows[r] = Vec<T>::loadu(y + r * pitch + at);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) {
        const Vec<T> column = Vec<T>::loadu(x + offsets[j] + at);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[s][j * R + r] = at::vec::fmadd(rows[r], column, sums[s][j * R + r]);
      }
    }
  }
  // Halves are added for all sums in turn, so that they do not wait for one another.
  alignas(64) T parts[J * R][lanes<T>];
#pragma GCC unroll 8
  for (int i = 0; i < J * R; ++i) {
    if constexpr (S == 2) sums[0][i] = sums[0][i] + sums[1][i];
    sums[0][i].store(parts[i]);
  }
  for (int64_t half = lanes<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < J * R; ++i)
      for (int64_t l = 0; l < half; ++l) parts[i][l] += parts[i][l + half];
  for (int i = 0; i < J * R; ++i) dots[i] += parts[i][0];
}

// The sum over p of values[p * R + r] * x[columns[p]], for each r.
template <typename T, int R>
inline void multiply_vector(const T* x, const int32_t* columns, const T* values, int64_t count, T* y) {
  int64_t p = 0;
  T sums[R] = {};
  if constexpr (R == 1) {
    constexpr int64_t chunk = 4;
    T partial[chunk] = {};
    Vec<T> sum[2] = {Vec<T>(T(0)), Vec<T>(T(0))};
    alignas(64) T gathered[2][lanes<T>];
    for (; p + 2 * lanes<T> <= count; p += 2 * lanes<T>) {
      for (int half = 0; half < 2; ++half) {
        for (int64_t l = 0; l < lanes<T>; ++l) gathered[half][l] = x[columns[p + half * lanes<T> + l]];
        sum[half] = at::vec::fmadd(
            Vec<T>::loadu(values + p + half * lanes<T>), Vec<T>::loadu(gathered[half]), sum[half]);
      }
    }
    (sum[0] + sum[1]).store(gathered[0]);
    for (int64_t l = 0; l < lanes<T>; ++l) partial[l % chunk] += gathered[0][l];
    sums[0] = (partial[0] + partial[1]) + (partial[2] + partial[3]);
  }
  for (; p < count; ++p)
    for (int r = 0; r < R; ++r) sums[r] += values[p * R + r] * x[columns[p]];
  for (int r = 0; r < R; ++r) y[r] = sums[r];
}

}  // namespace fxsparse
