// A GRU over a sequence, the weight of its state sparse: a product of the stored weights with one vector, step after
// step. What it takes from its input is computed beforehand, for all steps at once.
//
// One vector is too little for the loops of product.h, and reading it entry by entry is slow: gathers take longer than
// the multiply-adds. Here the matrix lies in tiles of 16 rows and 32 columns. A tile's columns of x are two registers,
// out of which one permutation takes an entry for each row. A row of the tile is a lane, and a tile has as many steps
// as its fullest row has weights; where a lane has none its value is 0.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#if defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#endif

#include "product.h"

namespace fxsparse {

constexpr int64_t tile_rows = 16, tile_columns = 32;

inline int64_t up_to(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

constexpr int64_t packed = 6;    // places of a lane, 5 bits each, in one word

// A matrix by tiles, as fxsparse/kernels/recurrent.py makes it.
template <typename T>
struct Tiles {
  const int32_t* runs;    // (runs, 3): column of tiles, steps of each tile, number of tiles
  int64_t count;          // of runs
  const int32_t* rows;    // (tiles): row of tiles
  const int32_t* places;  // (words, 16): columns within the tile; a tile begins with a new word
  const int16_t* stored;  // (steps): a bit for each lane that has a weight
  const T* values;        // (steps, 16)

  // y += matrix * x, both padded to whole tiles. `finite`: whether all of x is. Where it is not, lanes without a weight
  // must not read it.
  void multiply(const T* x, T* y, bool finite) const {
    Position at{rows, places, stored, values};
    for (int64_t i = 0; i < count; ++i) {
      const T* from = x + runs[3 * i] * tile_columns;
      const int64_t steps = runs[3 * i + 1], tiles = runs[3 * i + 2];
#if defined(CPU_CAPABILITY_AVX512)
      if constexpr (std::is_same_v<T, float>) {
        if (finite) {
          switch (steps) {  // tiles of a run have as many steps as one another: no branch is unforeseen
#define FXSPARSE_STEPS(n) case n: at.template permuted<n>(from, y, n, tiles); continue;
            FXSPARSE_STEPS(1) FXSPARSE_STEPS(2) FXSPARSE_STEPS(3) FXSPARSE_STEPS(4) FXSPARSE_STEPS(5)
            FXSPARSE_STEPS(6) FXSPARSE_STEPS(7) FXSPARSE_STEPS(8) FXSPARSE_STEPS(9) FXSPARSE_STEPS(10)
            FXSPARSE_STEPS(11) FXSPARSE_STEPS(12)
#undef FXSPARSE_STEPS
            default: at.template permuted<0>(from, y, steps, tiles); continue;
          }
        }
      }
#endif
      at.one_by_one(from, y, steps, tiles, finite);
    }
  }

 private:
  struct Position {
    const int32_t* row;
    const int32_t* place;
    const int16_t* lanes;
    const T* value;

    void one_by_one(const T* x, T* y, int64_t steps, int64_t tiles, bool finite) {
      for (; tiles > 0; --tiles, place += up_to(steps, packed) / packed * tile_rows) {
        T* sums = y + *row++ * tile_rows;
        for (int64_t step = 0; step < steps; ++step, ++lanes, value += tile_rows) {
          const int32_t* words = place + step / packed * tile_rows;
          const int shift = 5 * (step % packed);
          for (int64_t lane = 0; lane < tile_rows; ++lane)
            if (finite || (*lanes >> lane & 1) != 0)
              sums[lane] += value[lane] * x[words[lane] >> shift & (tile_columns - 1)];
        }
      }
    }

#if defined(CPU_CAPABILITY_AVX512)
    // `Steps` is the number of steps where it is known beforehand, else 0.
    template <int Steps>
    void permuted(const float* x, float* y, int64_t steps, int64_t tiles) {
      const __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
      for (; tiles > 0; --tiles) {
        float* at = y + *row++ * tile_rows;
        __m512 sums[2] = {_mm512_loadu_ps(at), _mm512_setzero_ps()};
        __m512i words;
        const auto add = [&](int64_t step, int64_t of_word) {
          if (of_word == 0) {
            words = _mm512_loadu_si512(place);
            place += tile_rows;
          }
          const __m512 column = _mm512_permutex2var_ps(low, words, high);  // it reads the lowest 5 bits
          words = _mm512_srli_epi32(words, 5);
          sums[step % 2] = _mm512_fmadd_ps(_mm512_loadu_ps(value + step * tile_rows), column, sums[step % 2]);
        };
        if constexpr (Steps > 0) {
#pragma GCC unroll 12
          for (int64_t step = 0; step < Steps; ++step) add(step, step % packed);
        } else {
          for (int64_t step = 0, of_word = 0; step < steps; ++step, of_word = of_word == packed - 1 ? 0 : of_word + 1)
            add(step, of_word);
        }
        value += steps * tile_rows;
        lanes += steps;
        _mm512_storeu_ps(at, _mm512_add_ps(sums[0], sums[1]));
      }
    }
#endif
  };
};

template <typename T>
struct SparseGRU {
  Tiles<T> tiles;
  const T* bias;         // (3 parts, hidden padded): of the tiles' rows
  const int32_t* units;  // (hidden): which unit of the state each row of a part is
  int64_t time, hidden;

  // What the three gates take from the input, (time, 3 parts), and the first state (hidden) to the states
  // (time, hidden) and the last one. The parts are reset, update and new value, each padded to whole tiles.
  void run(const T* from_input, const T* first, T* states, T* last) const {
    const int64_t part = up_to(hidden, tile_rows);
    std::vector<T> state(up_to(hidden, tile_columns), T(0)), sums(3 * part), ordered(part, T(0));
    std::copy(first, first + hidden, state.data());
    for (int64_t n = 0; n < hidden; ++n) ordered[n] = first[units[n]];
    for (int64_t t = 0; t < time; ++t) {
      std::copy(bias, bias + 3 * part, sums.data());
      tiles.multiply(state.data(), sums.data(), finite(state));
      gates(from_input + t * 3 * part, sums.data(), part, ordered.data());
      for (int64_t n = 0; n < hidden; ++n) state[units[n]] = ordered[n];
      std::copy(state.data(), state.data() + hidden, states + t * hidden);
    }
    std::copy(state.data(), state.data() + hidden, last);
  }

  static void gates(const T* from_input, const T* from_state, int64_t part, T* state) {
    const Vec<T> one(T(1)), two(T(2)), sign(T(-0.0));
    const auto sigmoid = [&](const Vec<T>& v) { return one / (one + v.neg().exp()); };
    for (int64_t n = 0; n < part; n += lanes<T>) {
      const auto at = [&](const T* from, int64_t which) { return Vec<T>::loadu(from + which * part + n); };
      const Vec<T> reset = sigmoid(at(from_input, 0) + at(from_state, 0));
      const Vec<T> update = sigmoid(at(from_input, 1) + at(from_state, 1));
      const Vec<T> inner = at::vec::fmadd(reset, at(from_state, 2), at(from_input, 2));
      const Vec<T> small = (inner.abs() * two).neg().exp();  // at most 1; tanh(|v|) = (1 - small) / (1 + small)
      const Vec<T> fresh = ((one - small) / (one + small)) | (inner & sign);
      at::vec::fmadd(update, Vec<T>::loadu(state + n) - fresh, fresh).store(state + n);
    }
  }

  static bool finite(const std::vector<T>& vector) {
    const Vec<T> zero(T(0));
    Vec<T> sum = zero;
    for (size_t n = 0; n < vector.size(); n += lanes<T>)
      sum = at::vec::fmadd(Vec<T>::loadu(vector.data() + n), zero, sum);
    alignas(64) T parts[lanes<T>];
    sum.store(parts);
    return std::all_of(parts, parts + lanes<T>, [](T entry) { return entry == T(0); });
  }
};

}  // namespace fxsparse
