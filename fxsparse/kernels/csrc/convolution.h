// A convolution with a sparse weight, and its two gradients.
#pragma once

#include <ATen/Parallel.h>

#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "exact.h"
#include "geometry.h"
#include "product.h"

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

// What is done with a result before it is stored: + bias of the channel, + an activation of the output's layout,
// limited to [low, high].
template <typename T>
struct Finish {
  const T* bias = nullptr;
  const T* residual = nullptr;
  bool limited = false;
  T low = 0, high = 0;
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

// An activation, and the parts of its channels that lie in rows of slots of their own.
template <typename T>
struct Activation {
  T* pixels;
  Strides strides;
  std::vector<Part> parts;
  int64_t channels;

  int64_t rows() const { return channels * static_cast<int64_t>(parts.size()); }
};

// A panel's rows from the slots [from, to) of rows [begin, end) of an activation.
template <typename T>
inline void pack(
    const Geometry& g, const Activation<const T>& source, int64_t begin, int64_t end, int64_t from, int64_t to,
    const Panel<T>& panel) {
  const int64_t parts = source.parts.size();
  for (int64_t part = 0; part < parts; ++part) {
    const auto runs = runs_between(g, source.strides, source.parts[part], from, to);
    for (int64_t channel = begin / parts; channel < end / parts; ++channel) {
      fill(panel.row((channel - begin / parts) * parts + part), from, to, runs,
           source.pixels + channel * source.strides.channel, source.parts[part].column_step);
    }
  }
}

template <int V>
using Width = std::integral_constant<int, V>;

// Calls `body` with a number of vectors, at most `Widest`, as a constant.
template <int Widest, typename Body>
inline void with_width(int64_t vectors, const Body& body) {
  if constexpr (Widest > 1) {
    if (vectors < Widest) return with_width<Widest - 1>(vectors, body);
  }
  body(Width<Widest>());
}

// Columns of a panel of `rows` rows: as many as the second-level cache holds, and no more than there are for each task.
template <typename T>
inline int64_t panel_width(int64_t rows, int64_t columns, int64_t tasks) {
  constexpr int64_t bytes = 512 * 1024, unit = 8 * lanes<T>;
  const int64_t fit = bytes / (std::max<int64_t>(rows, 1) * static_cast<int64_t>(sizeof(T)));
  const int64_t share = ((columns + tasks - 1) / tasks + unit - 1) / unit * unit;
  return std::max(unit, std::min(std::clamp(fit / unit * unit, 2 * unit, 32 * unit), share));
}

// Offsets into a panel are int32, for twice as many of them in a cache line.
inline void check_offsets(int64_t rows, int64_t pitch) {
  TORCH_CHECK_VALUE(
      rows * pitch <= std::numeric_limits<int32_t>::max(), "rows of pixels too long for the sparse kernels: ", rows,
      " rows of ", pitch, " numbers are kept at once, more than an int32 counts");
}

// Stores a row of sums, V vectors from slot `column` on, where it has pixels; with a residual, adds it and limits first.
template <typename T, int V>
inline void store(
    T* sums, int64_t column, const std::vector<Run>& runs, const Finish<T>& finish, int64_t base, int64_t step,
    T* pixels) {
  if (finish.residual != nullptr) {
    for (const Run& run : runs) {
      const T* added = finish.residual + base + run.offset;
      T* target = sums + (run.slot - column);
      for (int64_t i = 0; i < run.length; ++i) target[i] += added[i * step];
    }
    if (finish.limited) {
      const Vec<T> low(finish.low), high(finish.high);
      for (int v = 0; v < V; ++v) {
        const Vec<T> sum = Vec<T>::loadu(sums + v * lanes<T>);
        at::vec::minimum(at::vec::maximum(sum, low), high).store(sums + v * lanes<T>);
      }
    }
  }
  for (const Run& run : runs)
    copy_strided(sums + (run.slot - column), 1, pixels + base + run.offset, step, run.length);
}

// Where rows of slots are rows of pixels without gaps, they can be read where they are: if they begin with whole vectors,
// as loads across lines of the cache cost more than a copy, and if they do not lie a multiple of half a page apart, so
// that all of them would fall on the same lines.
template <typename T>
inline bool reads_in_place(const Geometry& g, const Activation<const T>& source) {
  const bool plain = g.images == 1 && g.high.is_pointwise() && g.wide.is_pointwise() && g.high.input == 1;
  const int64_t pitch = source.strides.channel;
  return plain && g.columns() >= lanes<T> && pitch % lanes<T> == 0 && pitch * static_cast<int64_t>(sizeof(T)) % 2048 != 0;
}

// A product of compressed rows with an activation's rows of slots: what a forward pass and an input gradient share.
// Row i gives the R channels i * R and on of the result (or, with several parts, part i % parts of a channel).
// `write_offsets(offsets, pitch)` writes where each of `count` entries reads: line * pitch + shift, where the line is a
// row of the activation, counted from the first of its group, and the shift is between 0 and `last - first` slots.
template <typename T, int R, typename WriteOffsets>
void product(
    const Geometry& g, const Activation<const T>& source, const Activation<T>& result, const Finish<T>& finish,
    const int32_t* starts, int64_t count, const WriteOffsets& write_offsets, const T* values,
    int64_t first, int64_t last, int64_t groups) {
  const int64_t columns = g.columns(), threads = at::get_num_threads();
  const int64_t parts = result.parts.size();
  const int64_t rows = result.rows() / R, rows_per_group = rows / groups;
  const int64_t source_rows = source.rows();
  const int64_t width = panel_width<T>(source_rows, columns, threads);
  const int64_t panels = (columns + width - 1) / width;
  if (panels == 0 || rows == 0) return;
  const int64_t shares = std::clamp<int64_t>((threads + panels - 1) / panels, 1, std::max<int64_t>(rows, 1));
  const int64_t reach = last - first;

  const bool in_place = reads_in_place(g, source);
  const auto offsets = std::make_unique_for_overwrite<int32_t[]>(count);
  const int64_t pitch = in_place ? source.strides.channel : Panel<T>(0, width + reach).pitch;
  check_offsets(source_rows, pitch);
  write_offsets(offsets.get(), pitch);

  at::parallel_for(0, panels * shares, 1, [&](int64_t begin, int64_t end) {
    const Panel<T> panel(in_place ? 0 : source_rows, width + reach);
    const Panel<T> sums(R, widest<R> * lanes<T>);
    std::vector<std::vector<Run>> runs(parts);
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t from = task / shares * width, to = std::min(columns, from + width);
      if (packed != from && !in_place) pack(g, source, 0, source_rows, from + first, from + width + last, panel);
      packed = from;
      const int64_t row_begin = rows * (task % shares) / shares, row_end = rows * (task % shares + 1) / shares;
      for (int64_t column = from, vectors = 0; column < to; column += vectors * lanes<T>) {
        vectors = std::min<int64_t>((to - column + lanes<T> - 1) / lanes<T>, widest<R>);
        if (in_place && column + vectors * lanes<T> > columns) {  // no reading beyond the end: whole vectors, or back
          vectors = std::max<int64_t>((to - column) / lanes<T>, 1);
          column = std::min(column, columns - vectors * lanes<T>);
        }
        for (int64_t part = 0; part < parts; ++part) {
          runs[part] = runs_between(
              g, result.strides, result.parts[part], column, std::min(columns, column + vectors * lanes<T>));
        }
        with_width<widest<R>>(vectors, [&](auto wide) {
          constexpr int V = decltype(wide)::value;
          for (int64_t row = row_begin; row < row_end; ++row) {
            const auto& here = runs[row % parts];
            if (here.empty()) continue;
            const int64_t first_line = row / rows_per_group * (source_rows / groups);
            const T* x = in_place ? source.pixels + first_line * pitch + column : panel.row(first_line) + (column - from);
            const int64_t start = starts[row], channel = row / parts * R, step = result.parts[row % parts].column_step;
            Ending<T> ending;
            if (finish.bias != nullptr) ending.initial = finish.bias + channel;
            const int64_t base = result.strides.channel * channel;
            const auto times = [&](T* y, int64_t y_pitch) {
              multiply<T, R, V>(
                  x, offsets.get() + start, values + start * R, starts[row + 1] - start, ending, y, y_pitch);
            };
            if (here[0].length == V * lanes<T> && step == 1) {
              if (finish.residual != nullptr) ending.added = finish.residual + base + here[0].offset;
              ending.limited = finish.limited;
              ending.low = finish.low;
              ending.high = finish.high;
              times(result.pixels + base + here[0].offset, result.strides.channel);
              continue;
            }
            ending.limited = finish.limited && finish.residual == nullptr;
            ending.low = finish.low;
            ending.high = finish.high;
            times(sums.row(0), sums.pitch);
            for (int r = 0; r < R; ++r) {
              store<T, V>(
                  sums.row(r), column, here, finish, base + r * result.strides.channel, step, result.pixels);
            }
          }
        });
      }
    }
  });
}

// Where each position of a weight's flattened row reads in panels of input rows with a given pitch.
inline std::vector<int32_t> reading_offsets(const Geometry& g, int64_t pitch) {
  const int64_t taps = g.taps(), planes = g.planes.size();
  std::vector<int32_t> offsets(g.row_length());
  for (int64_t k = 0; k < g.row_length(); ++k)
    offsets[k] = static_cast<int32_t>((k / taps * planes + g.plane_of[k % taps]) * pitch + g.shift_of[k % taps] - g.first());
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

// y = convolution of x, finished.
template <typename T, int R>
void forward(
    const Geometry& g, const T* x, const Strides& x_strides, const Rows& weight, int64_t count, const T* values,
    const Finish<T>& finish, T* y, const Strides& y_strides) {
  const Activation<const T> source{x, x_strides, input_parts(g), g.in_channels};
  const Activation<T> result{y, y_strides, {output_part(g)}, g.out_channels};
  const auto write_offsets = [&](int32_t* offsets, int64_t pitch) {
    if (g.taps() == 1) {
      const auto step = static_cast<int32_t>(pitch);  // one plane, and no shift
      for (int64_t p = 0; p < count; ++p) offsets[p] = weight.columns[p] * step;
      return;
    }
    gather_offsets(reading_offsets(g, pitch), weight.columns, count, offsets);
  };
  product<T, R>(g, source, result, finish, weight.starts, count, write_offsets, values, g.first(), g.last(), g.groups);
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
  std::vector<int32_t> starts(rows + 1), lines(count * R), shifts(count * R);
  std::vector<T> turned(count * R);
  int64_t next = 0;
  for (int64_t row = 0; row < rows; ++row) {
    starts[row] = static_cast<int32_t>(next);
    const int64_t channel = row / planes, first_line = channel / g.in_per_group() * outputs_per_group;
    for (int64_t tap = 0; tap < taps; ++tap) {
      if (g.plane_of[tap] != row % planes) continue;
      const int64_t column = channel * taps + tap;
      for (int64_t p = weight.starts[column]; p < weight.starts[column + 1]; ++p) {
        for (int r = 0; r < R; ++r, ++next) {
          lines[next] = static_cast<int32_t>(weight.rows[p] * R + r - first_line);
          shifts[next] = static_cast<int32_t>(-g.shift_of[tap]);
          turned[next] = values[static_cast<int64_t>(weight.places[p]) * R + r];
        }
      }
    }
  }
  starts[rows] = static_cast<int32_t>(next);
  const Activation<const T> source{dy, dy_strides, {output_part(g)}, g.out_channels};
  const Activation<T> result{dx, dx_strides, input_parts(g), g.in_channels};
  const auto write_offsets = [&](int32_t* offsets, int64_t pitch) {
    for (int64_t p = 0; p < next; ++p) offsets[p] = static_cast<int32_t>(lines[p] * pitch + shifts[p] + g.last());
  };
  product<T, 1>(g, source, result, Finish<T>(), starts.data(), next, write_offsets, turned.data(), -g.last(),
                -g.first(), g.groups);
}

// dvalues += the gradient of the stored weights: dot products of output gradients with input rows.
//
// Tiles of input channels by columns stay in the cache, wide enough that summing up a vector does not show. Columns of a
// pattern's row ascend, so that each tile reads a stretch of it; `cursors` hold where the next tile's begins.
template <typename T, int R>
void weight_gradient(
    const Geometry& g, const T* x, const Strides& x_strides, const T* dy, const Strides& dy_strides, const Rows& weight,
    int64_t count, T* dvalues) {
  const Activation<const T> input{x, x_strides, input_parts(g), g.in_channels};
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
  const auto reading = reading_offsets(g, pitch);
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
                fill(gradients.row(r), from, from + width, runs, dy + (row * R + r) * dy_strides.channel, 1);
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
