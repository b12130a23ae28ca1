// A convolution with a sparse weight, and its two gradients.
#pragma once

#include <ATen/Parallel.h>

#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "checks.h"
#include "exact.h"
#include "geometry.h"
#include "plan.h"
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

// Where rows of slots are rows of pixels without gaps, they can be read where they are: if they begin with whole vectors,
// as loads across lines of the cache cost more than a copy, and if they do not lie a multiple of half a page apart, so
// that all of them would fall on the same lines.
template <typename T>
inline bool reads_in_place(const Geometry& g, const Activation<const T>& source) {
  const bool plain = g.images == 1 && g.high.is_pointwise() && g.wide.is_pointwise() && g.high.input == 1;
  const int64_t pitch = source.strides.channel;
  return plain && g.columns() >= lanes<T> && pitch % lanes<T> == 0 && pitch * static_cast<int64_t>(sizeof(T)) % 2048 != 0;
}

// Tiles of the source's channels: the entries of a row that read one tile are multiplied before those of the next.
struct Tiling {
  int64_t tiles, channels;  // of the source, in a tile
  bool narrow;              // whether 16 bits hold where an entry reads in its tile

  // Tiles whose columns fit in the first-level cache, or else whose offsets fit in 16 bits; unless the stretches of rows
  // are so short that carrying sums from one to the next costs more.
  template <typename T, int R>
  static Tiling of(const Geometry& g, int64_t channels, int64_t planes, int64_t pitch, int64_t rows, int64_t count) {
    constexpr int64_t bytes = 32 * 1024, products = 96;
    if (count == 0 || planes == 0) return {1, channels, false};
    const int64_t vectors = std::min<int64_t>(widest<R>, (g.columns() + lanes<T> - 1) / lanes<T>);
    const int64_t line = (vectors * lanes<T> + g.last() - g.first()) * static_cast<int64_t>(sizeof(T)) * planes;
    const int64_t fit = bytes / std::max<int64_t>(line, 1), reach = (int64_t{1} << 16) / (pitch * planes);
    for (const int64_t most : {fit, fit * 3 / 2, reach}) {
      const int64_t tiles = most < 8 ? channels : (channels + most - 1) / most;
      if (tiles != 1 && count * vectors < products * tiles * rows) continue;
      const int64_t each = std::min(((channels + tiles - 1) / tiles + 7) / 8 * 8, channels);  // no block is cut
      return {(channels + each - 1) / each, each, each <= reach};
    }
    return {1, channels, false};
  }
};

// Has memory brought to the second-level cache: stretches of rows that are read tile by tile are not foreseen by the
// processor, and weights do not stay in its caches from one image to the next.
template <typename T>
inline void ask_for(const T* begin, const T* end) {
  for (const T* at = begin; at < end; at += 64 / sizeof(T)) __builtin_prefetch(at, 0, 2);
}

// A product of compressed rows with an activation's rows of slots: what a forward pass and an input gradient share.
// Row i gives the R channels i * R and on of the result (or, with several parts, part i % parts of a channel).
// `prepare(pitch, tiling)` gives where each of `count` entries reads: line * pitch + shift, where the line is a row of the
// activation, counted from the first of its group or tile, and the shift is between 0 and `last - first` slots; and, where
// there are several tiles, where each row's entries of each tile end.
using Prepare = std::function<std::shared_ptr<const Plan>(int64_t pitch, const Tiling& tiling)>;

template <typename T, int R>
void product(
    const Geometry& g, const Activation<const T>& source, const Activation<T>& result, const Finish<T>& finish,
    const int32_t* starts, int64_t count, const Prepare& prepare, const T* values, int64_t first, int64_t last,
    int64_t groups) {
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
  const int64_t pitch = in_place ? source.strides.channel : Panel<T>(0, width + reach).pitch;
  check_offsets(source_rows, pitch);
  Tiling tiling{1, source.channels, false};
  if (groups == 1) tiling = Tiling::of<T, R>(g, source.channels, source.parts.size(), pitch, rows, count);
  const int64_t tiles = tiling.tiles, tile_lines = tiling.channels * static_cast<int64_t>(source.parts.size());
  const std::shared_ptr<const Plan> plan = prepare(pitch, tiling);
  const int64_t chunk = tiles == 1 ? rows : std::max<int64_t>(128 / R, 1);  // rows whose sums stay close by

  const auto run = [&](const auto* offsets, int64_t begin, int64_t end) {
    const Panel<T> panel(in_place ? 0 : source_rows, width + reach);
    const Panel<T> sums((tiles == 1 ? 1 : chunk) * R, (widest<R> + 1) * lanes<T>);
    std::vector<std::vector<Run>> runs(parts);
    std::vector<std::vector<Move>> moves(parts);
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
          if (result.parts[part].column_step == 1) moves[part] = storing<T>(column, runs[part]);
        }
        with_width<widest<R>>(vectors, [&](auto wide) {
          constexpr int V = decltype(wide)::value;
          const auto reads = [&](int64_t row, int64_t tile) {
            const int64_t first_line = groups > 1 ? row / rows_per_group * (source_rows / groups) : tile * tile_lines;
            return in_place ? source.pixels + first_line * pitch + column : panel.row(first_line) + (column - from);
          };
          const Start numbers = finish.bias == nullptr ? Start::zero : Start::numbers;
          // A row's last entries [start, stop), or all of them; `own` has its sums so far, or room for them.
          const auto finish_row = [&](int64_t row, int64_t start, int64_t stop, T* own) {
            const int64_t part = parts == 1 ? 0 : row % parts, channel = (parts == 1 ? row : row / parts) * R;
            const auto& here = runs[part];
            if (here.empty()) return;
            const int64_t step = result.parts[part].column_step, base = result.strides.channel * channel;
            const bool direct = here[0].length == V * lanes<T> && step == 1;
            Ending<T> ending;
            if (direct) {
              if (finish.residual != nullptr) ending.added = finish.residual + base + here[0].offset;
              ending.limited = finish.limited;
              ending.low = finish.low;
              ending.high = finish.high;
            }
            multiply<T, R, V>(
                reads(row, tiles - 1), offsets + start, values + start * R, stop - start, tiles > 1 ? Start::sums : numbers,
                tiles > 1 ? own : finish.bias + channel, sums.pitch, ending,
                direct ? result.pixels + base + here[0].offset : own, direct ? result.strides.channel : sums.pitch);
            if (direct) return;
            for (int r = 0; r < R; ++r) {
              const T* const from_sums = own + r * sums.pitch;
              const int64_t to_pixels = base + r * result.strides.channel;
              if (step == 1) {
                store(from_sums, moves[part], finish, to_pixels, result.pixels);
                continue;
              }
              for (const Run& run : here)
                copy_strided(from_sums + (run.slot - column), 1, result.pixels + to_pixels + run.offset, step, run.length);
            }
          };
          if (tiles == 1) {
            for (int64_t row = row_begin; row < row_end; ++row)
              finish_row(row, starts[row], starts[row + 1], sums.row(0));
            return;
          }
          for (int64_t chunk_begin = row_begin; chunk_begin < row_end; chunk_begin += chunk) {
            const int64_t chunk_end = std::min(chunk_begin + chunk, row_end);
            for (int64_t tile = 0; tile < tiles; ++tile) {
              T* own = sums.row(0);
              const T* const x = reads(chunk_begin, tile);
              for (int64_t row = chunk_begin; row < chunk_end; ++row, own += R * sums.pitch) {
                const int32_t* ends = plan->ends.data() + row * tiles + tile;
                const int64_t start = tile == 0 ? starts[row] : ends[-1];
                if (tile == tiles - 1) {
                  finish_row(row, start, *ends, own);
                  continue;
                }
                ask_for(offsets + *ends, offsets + ends[1]);
                ask_for(values + *ends * R, values + ends[1] * R);
                if (tile == 0 && row + 4 < rows) {
                  const int64_t ahead = starts[row + 4], behind = ends[4 * tiles];
                  ask_for(offsets + ahead, offsets + behind);
                  ask_for(values + ahead * R, values + behind * R);
                }
                multiply<T, R, V>(
                    x, offsets + start, values + start * R, *ends - start, tile == 0 ? numbers : Start::sums,
                    tile == 0 ? finish.bias + row * R : own, sums.pitch, Ending<T>(), own, sums.pitch);
              }
            }
          }
        });
      }
    }
  };
  at::parallel_for(0, panels * shares, 1, [&](int64_t begin, int64_t end) {
    tiling.narrow ? run(plan->narrow.data(), begin, end) : run(plan->wide.data(), begin, end);
  });
}

// Where each position of a weight's flattened row reads in panels of input rows with a given pitch, in tiles of so many
// channels.
inline std::vector<int32_t> reading_offsets(const Geometry& g, int64_t pitch, int64_t channels) {
  const int64_t taps = g.taps(), planes = g.planes.size();
  std::vector<int32_t> offsets(g.row_length());
  for (int64_t k = 0; k < g.row_length(); ++k)
    offsets[k] = static_cast<int32_t>((k / taps % channels * planes + g.plane_of[k % taps]) * pitch + g.shift_of[k % taps] - g.first());
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

// y = convolution of x, finished. With `pattern`, the tensor of the weight's columns, the plan is remembered.
template <typename T, int R>
void forward(
    const Geometry& g, const T* x, const Strides& x_strides, const Rows& weight, int64_t count, const T* values,
    const Finish<T>& finish, T* y, const Strides& y_strides, const at::Tensor* pattern) {
  const Activation<const T> source{x, x_strides, input_parts(g), g.in_channels};
  const Activation<T> result{y, y_strides, {output_part(g)}, g.out_channels};
  const auto prepare = [&](int64_t pitch, const Tiling& tiling) {
    TORCH_CHECK_VALUE(all_within(weight.columns, count, 0, g.row_length()),
                      "the pattern has columns outside of rows of ", g.row_length(), " positions");
    auto plan = std::make_shared<Plan>(count, tiling.narrow);
    const auto reading = reading_offsets(g, pitch, tiling.channels);
    if (tiling.narrow) {
      for (int64_t p = 0; p < count; ++p) plan->narrow[p] = static_cast<uint16_t>(reading[weight.columns[p]]);
    } else {
      for (int64_t p = 0; p < count; ++p) plan->wide[p] = reading[weight.columns[p]];
    }
    if (tiling.tiles == 1) return plan;
    plan->ends.resize(g.out_channels / R * tiling.tiles);
    for (int64_t i = 0; i < static_cast<int64_t>(plan->ends.size()); ++i) {
      const int64_t row = i / tiling.tiles, stop = (i % tiling.tiles + 1) * tiling.channels * g.taps();
      const int32_t* from = weight.columns + (i % tiling.tiles == 0 ? weight.starts[row] : plan->ends[i - 1]);
      plan->ends[i] =
          static_cast<int32_t>(std::lower_bound(from, weight.columns + weight.starts[row + 1], stop) - weight.columns);
    }
    return plan;
  };
  const Prepare remembered = [&](int64_t pitch, const Tiling& tiling) -> std::shared_ptr<const Plan> {
    if (pattern == nullptr) return prepare(pitch, tiling);
    const Plans::Key key{pitch * 2 + tiling.narrow, tiling.channels, g.taps(), g.wide.slots, g.high.kernel, g.high.stride, g.wide.stride,
                         g.high.padding * (int64_t{1} << 32) + g.wide.padding, g.high.dilation * (int64_t{1} << 32) + g.wide.dilation, R};
    auto plan = Plans::all().find(*pattern, key);
    if (plan == nullptr) Plans::all().put(*pattern, key, plan = prepare(pitch, tiling));
    return plan;
  };
  product<T, R>(g, source, result, finish, weight.starts, count, remembered, values, g.first(), g.last(), g.groups);
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
  std::vector<int32_t> starts(rows + 1);
  std::vector<T> turned(count * R);
  // The rows of the turned weight: (input channel, plane), with an entry for each output channel.
  const auto prepare = [&](int64_t pitch, const Tiling& tiling) -> std::shared_ptr<const Plan> {
    auto plan = std::make_shared<Plan>(count * R, tiling.narrow);
    if (tiling.tiles > 1) plan->ends.resize(rows * tiling.tiles);
    std::vector<int32_t> at(taps);
    int64_t next = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t channel = row / planes, first = channel / g.in_per_group() * outputs_per_group;
      const int32_t* begin = weight.starts + channel * taps;
      std::copy(begin, begin + taps, at.begin());
      for (int64_t tile = 0; tile < tiling.tiles; ++tile) {
        const bool last = tile == tiling.tiles - 1;
        const int64_t first_line = first + tile * tiling.channels;
        for (int64_t tap = 0; tap < taps; ++tap) {
          if (g.plane_of[tap] != row % planes) continue;
          const auto shift = static_cast<int32_t>(g.last() - g.shift_of[tap]);
          int64_t p = at[tap];
          for (; p < begin[tap + 1]; ++p) {
            const int64_t line = weight.rows[p] * R - first_line;
            if (!last && line >= tiling.channels) break;
            for (int r = 0; r < R; ++r, ++next) {
              const auto offset = static_cast<int32_t>((line + r) * pitch) + shift;
              tiling.narrow ? plan->narrow[next] = static_cast<uint16_t>(offset) : plan->wide[next] = offset;
              turned[next] = values[static_cast<int64_t>(weight.places[p]) * R + r];
            }
          }
          at[tap] = static_cast<int32_t>(p);
        }
        if (tiling.tiles > 1) plan->ends[row * tiling.tiles + tile] = static_cast<int32_t>(next);
      }
      starts[row + 1] = static_cast<int32_t>(next);
    }
    return plan;
  };
  const Activation<const T> source{dy, dy_strides, {output_part(g)}, g.out_channels};
  const Activation<T> result{dx, dx_strides, input_parts(g), g.in_channels};
  product<T, 1>(g, source, result, Finish<T>(), starts.data(), count * R, prepare, turned.data(), -g.last(),
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
  const auto reading = reading_offsets(g, pitch, g.in_channels);
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
