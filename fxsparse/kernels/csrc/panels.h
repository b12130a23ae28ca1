// Activations as rows of slots, and back: how pixels come into panels and how sums of a panel's columns become pixels.
#pragma once

#include <limits>
#include <new>
#include <vector>

#include "geometry.h"
#include "product.h"

namespace fxsparse {

// What is done with a result before it is stored: + bias of the channel, + an activation of the output's layout,
// limited to [low, high].
template <typename T>
struct Finish {
  const T* bias = nullptr;
  const T* residual = nullptr;
  bool limited = false;
  T low = 0, high = 0;

  const T* bias_of(int64_t channel) const { return bias == nullptr ? nullptr : bias + channel; }
};

// Dense rows of slots: whole vectors each, and an odd number of them, as rows a page apart share lines of the cache.
template <typename T>
class Panel {
 public:
  Panel(int64_t rows, int64_t width)
      : pitch(((width + lanes<T> - 1) / lanes<T> | 1) * lanes<T>),
        numbers_(static_cast<T*>(::operator new(rows * pitch * sizeof(T), alignment))) {}
  ~Panel() { ::operator delete(numbers_, alignment); }
  Panel(const Panel&) = delete;
  Panel& operator=(const Panel&) = delete;

  T* row(int64_t index) const { return numbers_ + index * pitch; }

  const int64_t pitch;  // from one row to the next

 private:
  static constexpr std::align_val_t alignment{64};
  T* const numbers_;
};

// target[i * to_step] = source[i * from_step]; steps of 1 and 2 are vectorised.
template <typename T>
inline void copy_strided(const T* __restrict source, int64_t from_step, T* __restrict target, int64_t to_step, int64_t n) {
  if (from_step == 1 && to_step == 1) {
    for (int64_t i = 0; i < n; ++i) target[i] = source[i];
  } else if (from_step == 2 && to_step == 1) {
    for (int64_t i = 0; i < n; ++i) target[i] = source[2 * i];
  } else if (from_step == 1 && to_step == 2) {
    for (int64_t i = 0; i < n; ++i) target[2 * i] = source[i];
  } else {
    for (int64_t i = 0; i < n; ++i) target[i * to_step] = source[i * from_step];
  }
}

// Fills slots [from, to) of a panel's row with the pixels of `runs`, `step` apart in memory, and zeros between them.
template <typename T>
inline void fill(T* row, int64_t from, int64_t to, const std::vector<Run>& runs, const T* pixels, int64_t step) {
  int64_t slot = from;
  for (const Run& run : runs) {
    std::fill(row + (slot - from), row + (run.slot - from), T(0));
    copy_strided(pixels + run.offset, step, row + (run.slot - from), 1, run.length);
    slot = run.slot + run.length;
  }
  std::fill(row + (slot - from), row + (to - from), T(0));
}

// A copy of up to one vector between slots and pixels, or (offset -1) zeros for slots.
struct Move {
  int64_t slot, offset, count;
};

// What `fill` does, vector by vector, for pixels side by side. Slots are counted from `from`. A vector that ends in the
// middle runs over, into what the moves after it write, unless that is beyond the row or, in memory, beyond `end`.
template <typename T>
inline std::vector<Move> filling(int64_t from, int64_t to, const std::vector<Run>& runs, int64_t end) {
  std::vector<Move> moves;
  const auto add = [&](int64_t slot, int64_t stop, int64_t offset) {
    for (; slot < stop; slot += lanes<T>) {
      const bool whole = slot + lanes<T> <= to - from && offset + lanes<T> <= end;
      moves.push_back({slot, offset, whole ? lanes<T> : std::min(lanes<T>, stop - slot)});
      if (offset >= 0) offset += lanes<T>;
    }
  };
  int64_t slot = 0;
  for (const Run& run : runs) {
    add(slot, run.slot - from, -1);
    slot = run.slot - from + run.length;
    add(run.slot - from, slot, run.offset);
  }
  add(slot, to - from, -1);
  return moves;
}

template <typename T>
inline void fill(T* row, const std::vector<Move>& moves, const T* pixels) {
  const Vec<T> zero(T(0));
  for (const Move& move : moves) {
    if (move.count == lanes<T>) {
      (move.offset < 0 ? zero : Vec<T>::loadu(pixels + move.offset)).store(row + move.slot);
    } else {
      (move.offset < 0 ? zero : Vec<T>::loadu(pixels + move.offset, move.count)).store(row + move.slot, move.count);
    }
  }
}

// The moves that store `runs`, where pixels lie side by side: a vector runs over only into pixels of later runs.
template <typename T>
inline std::vector<Move> storing(int64_t from, const std::vector<Run>& runs) {
  std::vector<Move> moves;
  size_t joined = 0;  // the last run that follows without a gap
  for (size_t i = 0; i < runs.size(); ++i) {
    for (joined = std::max(joined, i); joined + 1 < runs.size(); ++joined)
      if (runs[joined + 1].offset != runs[joined].offset + runs[joined].length) break;
    const int64_t end = runs[joined].offset + runs[joined].length;
    for (int64_t n = 0; n < runs[i].length; n += lanes<T>) {
      const int64_t offset = runs[i].offset + n;
      const bool whole = offset + lanes<T> <= end;
      moves.push_back({runs[i].slot + n - from, offset, whole ? lanes<T> : std::min(lanes<T>, runs[i].length - n)});
    }
  }
  return moves;
}

// An activation, and the parts of its channels that lie in rows of slots of their own.
template <typename T>
struct Activation {
  T* pixels;
  Strides strides;
  std::vector<Part> parts;
  int64_t channels;

  int64_t rows() const { return channels * static_cast<int64_t>(parts.size()); }
  // From a channel's first pixel to behind the last one that a part has.
  int64_t extent(const Geometry& g) const {
    int64_t end = 0;
    for (const Part& part : parts) {
      if (part.rows <= 0 || part.columns <= 0) continue;
      const int64_t row = (part.rows - 1) * part.row_step + part.row_phase;
      end = std::max(end, row * strides.row + (part.columns - 1) * part.column_step + part.column_phase + 1);
    }
    return (g.images - 1) * strides.image + end;
  }
};

// A panel's rows from the slots [from, to) of rows [begin, end) of an activation.
template <typename T>
inline void pack(
    const Geometry& g, const Activation<const T>& source, int64_t begin, int64_t end, int64_t from, int64_t to,
    const Panel<T>& panel) {
  const int64_t parts = source.parts.size();
  for (int64_t part = 0; part < parts; ++part) {
    const auto runs = runs_between(g, source.strides, source.parts[part], from, to);
    if (source.parts[part].column_step == 1) {
      const auto moves = filling<T>(from, to, runs, source.extent(g));
      for (int64_t channel = begin / parts; channel < end / parts; ++channel)
        fill(panel.row((channel - begin / parts) * parts + part), moves, source.pixels + channel * source.strides.channel);
      continue;
    }
    for (int64_t channel = begin / parts; channel < end / parts; ++channel) {
      fill(panel.row((channel - begin / parts) * parts + part), from, to, runs,
           source.pixels + channel * source.strides.channel, source.parts[part].column_step);
    }
  }
}

// Stores a row of sums, with what is added and the limits, where it has pixels.
template <typename T>
inline void store(const T* sums, const std::vector<Move>& moves, const Finish<T>& finish, int64_t base, T* pixels) {
  const Vec<T> low(finish.low), high(finish.high);
  const T* residual = finish.residual == nullptr ? nullptr : finish.residual + base;
  T* const to = pixels + base;
  for (const Move& move : moves) {
    const bool whole = move.count == lanes<T>;
    Vec<T> sum = Vec<T>::loadu(sums + move.slot);
    if (residual != nullptr)
      sum = sum + (whole ? Vec<T>::loadu(residual + move.offset) : Vec<T>::loadu(residual + move.offset, move.count));
    if (finish.limited) sum = at::vec::minimum(at::vec::maximum(sum, low), high);
    if (whole) {
      sum.store(to + move.offset);
    } else {
      sum.store(to + move.offset, move.count);
    }
  }
}

// Offsets into a panel are int32, for twice as many of them in a cache line.
inline void check_offsets(int64_t rows, int64_t pitch) {
  TORCH_CHECK_VALUE(
      rows * pitch <= std::numeric_limits<int32_t>::max(), "rows of pixels too long for the sparse kernels: ", rows,
      " rows of ", pitch, " numbers are kept at once, more than an int32 counts");
}

}  // namespace fxsparse
