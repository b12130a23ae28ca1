// The product of compressed rows with an activation, tile by tile and panel by panel.
#pragma once

#include <ATen/Parallel.h>

#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include "panels.h"
#include "plan.h"

namespace fxsparse {

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
                tiles > 1 ? own : finish.bias_of(channel), sums.pitch, ending,
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
                    tile == 0 ? finish.bias_of(row * R) : own, sums.pitch, Ending<T>(), own, sums.pitch);
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

}  // namespace fxsparse
