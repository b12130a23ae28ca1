// A convolution with a sparse weight, and its two gradients.
#pragma once

#include <ATen/Parallel.h>

#include <limits>
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

// Fills slots [from, to) of a panel's row with the pixels of `runs`, `step` apart in memory, and zeros between them.
template <typename T>
inline void fill(T* row, int64_t from, int64_t to, const std::vector<Run>& runs, const T* pixels, int64_t step) {
  int64_t slot = from;
  for (const Run& run : runs) {
    std::fill(row + (slot - from), row + (run.slot - from), T(0));
    T* target = row + (run.slot - from);
    const T* source = pixels + run.offset;
    if (step == 1) {
      std::copy(source, source + run.length, target);
    } else {
      for (int64_t i = 0; i < run.length; ++i) target[i] = source[i * step];
    }
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

// Stores a row of sums, V vectors from slot `column` on, where it has pixels.
template <typename T, int V>
inline void store(
    T* sums, int64_t column, const std::vector<Run>& runs, const Finish<T>& finish, int64_t channel, int64_t base,
    int64_t step, T* pixels) {
  if (finish.bias != nullptr) {
    const Vec<T> bias(finish.bias[channel]);
    for (int v = 0; v < V; ++v) (Vec<T>::loadu(sums + v * lanes<T>) + bias).store(sums + v * lanes<T>);
  }
  if (finish.residual != nullptr) {
    for (const Run& run : runs) {
      const T* added = finish.residual + base + run.offset;
      T* target = sums + (run.slot - column);
      for (int64_t i = 0; i < run.length; ++i) target[i] += added[i * step];
    }
  }
  if (finish.limited) {
    const Vec<T> low(finish.low), high(finish.high);
    for (int v = 0; v < V; ++v) {
      const Vec<T> sum = Vec<T>::loadu(sums + v * lanes<T>);
      at::vec::minimum(at::vec::maximum(sum, low), high).store(sums + v * lanes<T>);
    }
  }
  for (const Run& run : runs) {
    const T* from = sums + (run.slot - column);
    T* target = pixels + base + run.offset;
    if (step == 1) {
      std::copy(from, from + run.length, target);
    } else {
      for (int64_t i = 0; i < run.length; ++i) target[i * step] = from[i];
    }
  }
}

// A product of compressed rows with an activation's rows of slots: what a forward pass and an input gradient share.
// Row i gives the R channels i * R and on of the result (or, with several parts, part i % parts of a channel). Entry p
// reads the activation's row `lines[p]`, counted from the first of its group, `shifts[p]` slots to the right.
template <typename T, int R>
void product(
    const Geometry& g, const Activation<const T>& source, const Activation<T>& result, const Finish<T>& finish,
    const int32_t* starts, int64_t count, const int32_t* lines, const int32_t* shifts, const T* values,
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

  std::vector<int32_t> offsets(count);
  const int64_t pitch = Panel<T>(0, width + reach).pitch;
  check_offsets(source_rows, pitch);
  for (int64_t p = 0; p < count; ++p) offsets[p] = static_cast<int32_t>(lines[p] * pitch + (shifts[p] - first));

  at::parallel_for(0, panels * shares, 1, [&](int64_t begin, int64_t end) {
    const Panel<T> panel(source_rows, width + reach);
    const Panel<T> sums(R, widest<R> * lanes<T>);
    std::vector<std::vector<Run>> runs(parts);
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t from = task / shares * width, to = std::min(columns, from + width);
      if (packed != from) pack(g, source, 0, source_rows, from + first, from + width + last, panel);
      packed = from;
      const int64_t row_begin = rows * (task % shares) / shares, row_end = rows * (task % shares + 1) / shares;
      for (int64_t column = from; column < to; column += widest<R> * lanes<T>) {
        const int64_t vectors = std::min<int64_t>((to - column + lanes<T> - 1) / lanes<T>, widest<R>);
        for (int64_t part = 0; part < parts; ++part) {
          runs[part] = runs_between(
              g, result.strides, result.parts[part], column, std::min(to, column + vectors * lanes<T>));
        }
        with_width<widest<R>>(vectors, [&](auto wide) {
          constexpr int V = decltype(wide)::value;
          for (int64_t row = row_begin; row < row_end; ++row) {
            const auto& here = runs[row % parts];
            if (here.empty()) continue;
            const T* x = panel.row(row / rows_per_group * (source_rows / groups)) + (column - from);
            const int64_t start = starts[row];
            multiply<T, R, V>(x, offsets.data() + start, values + start * R, starts[row + 1] - start, sums.row(0),
                              sums.pitch);
            for (int r = 0; r < R; ++r) {
              const int64_t channel = row / parts * R + r;
              store<T, V>(sums.row(r), column, here, finish, channel, result.strides.channel * channel,
                          result.parts[row % parts].column_step, result.pixels);
            }
          }
        });
      }
    }
  });
}

// Of a weight: where each position of its flattened row reads, as a line of a group's input and a shift.
struct Reading {
  std::vector<int32_t> line, shift;

  explicit Reading(const Geometry& g) : line(g.row_length()), shift(g.row_length()) {
    const int64_t taps = g.taps(), planes = g.planes.size();
    for (int64_t k = 0; k < g.row_length(); ++k) {
      line[k] = static_cast<int32_t>(k / taps * planes + g.plane_of[k % taps]);
      shift[k] = static_cast<int32_t>(g.shift_of[k % taps]);
    }
  }
};

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
  const Reading reading(g);
  std::vector<int32_t> lines(count), shifts(count);
  for (int64_t p = 0; p < count; ++p) {
    lines[p] = reading.line[weight.columns[p]];
    shifts[p] = reading.shift[weight.columns[p]];
  }
  const Activation<const T> source{x, x_strides, input_parts(g), g.in_channels};
  const Activation<T> result{y, y_strides, {output_part(g)}, g.out_channels};
  product<T, R>(g, source, result, finish, weight.starts, count, lines.data(), shifts.data(), values, g.first(),
                g.last(), g.groups);
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

// dx = the gradient of the input; `dx` holds zeros.
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
  product<T, 1>(g, source, result, Finish<T>(), starts.data(), next, lines.data(), shifts.data(), turned.data(),
                -g.last(), -g.first(), g.groups);
}

// dvalues += the gradient of the stored weights.
template <typename T, int R>
void weight_gradient(
    const Geometry& g, const T* x, const Strides& x_strides, const T* dy, const Strides& dy_strides, const Rows& weight,
    int64_t count, T* dvalues) {
  const Activation<const T> input{x, x_strides, input_parts(g), g.in_channels};
  const Activation<const T> output{dy, dy_strides, {output_part(g)}, g.out_channels};
  const int64_t columns = g.columns(), threads = at::get_num_threads();
  const int64_t rows = g.out_channels / R, rows_per_group = rows / g.groups, reach = g.last() - g.first();
  const int64_t width = panel_width<T>(input.rows() + R, columns, threads);
  const int64_t panels = (columns + width - 1) / width;
  if (panels == 0 || rows == 0) return;
  const Reading reading(g);
  std::vector<int32_t> offsets(count);
  const int64_t pitch = Panel<T>(0, width + reach).pitch;
  check_offsets(input.rows(), pitch);
  for (int64_t p = 0; p < count; ++p) {
    const int32_t column = weight.columns[p];
    offsets[p] = static_cast<int32_t>(reading.line[column] * pitch + reading.shift[column] - g.first());
  }
  // Each thread sums over columns of its own; the sums are added in a fixed order.
  const int64_t shares = std::min(threads, panels);
  std::vector<std::vector<T>> sums(shares);
  at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      sums[share].assign(share == 0 ? 0 : count * R, T(0));
      T* const dots = share == 0 ? dvalues : sums[share].data();
      const Panel<T> panel(input.rows(), width + reach), gradients(R, width);
      for (int64_t index = panels * share / shares; index < panels * (share + 1) / shares; ++index) {
        const int64_t from = index * width;
        pack(g, input, 0, input.rows(), from + g.first(), from + width + g.last(), panel);
        const auto runs = runs_between(g, dy_strides, output.parts[0], from, from + width);
        const int64_t length = (std::min(columns - from, width) + lanes<T> - 1) / lanes<T> * lanes<T>;
        for (int64_t row = 0; row < rows; ++row) {
          int64_t p = weight.starts[row];
          const int64_t stop = weight.starts[row + 1];
          if (p == stop) continue;
          for (int r = 0; r < R; ++r)
            fill(gradients.row(r), from, from + width, runs, dy + (row * R + r) * dy_strides.channel, 1);
          const T* lines = panel.row(row / rows_per_group * (input.rows() / g.groups));
          constexpr int J = R == 1 ? 4 : R == 2 ? 4 : R == 4 ? 2 : 1;
          for (; p + J <= stop; p += J)
            dot<T, R, J>(gradients.row(0), gradients.pitch, lines, offsets.data() + p, length, dots + p * R);
          for (; p < stop; ++p)
            dot<T, R, 1>(gradients.row(0), gradients.pitch, lines, offsets.data() + p, length, dots + p * R);
        }
      }
    }
  });
  for (int64_t share = 1; share < shares; ++share)
    for (int64_t i = 0; i < count * R; ++i) dvalues[i] += sums[share][i];
  make_exact<T, R>(g, x, x_strides, dy, dy_strides, weight.starts, weight.columns, dvalues);
}

}  // namespace fxsparse
