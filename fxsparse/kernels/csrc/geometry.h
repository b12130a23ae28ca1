// Where the numbers of a convolution lie.
//
// A convolution is a product of its sparse weight, one row an output channel, with rows of its input. For that, each
// input channel is laid out as one long row of slots: `images` x `height` x `width` of them, more than there are pixels,
// with zeros between the rows of pixels and between the images. Zeros stand for the padding on both of their sides.
// Output pixel (image, i, j) then is column (image * height + i) * width + j, and a weight at tap (a, b) multiplies the
// input row shifted by a fixed number of slots. With a stride, pixels are split into planes by their place modulo the
// stride; a tap reads one plane. Columns at slots without an output pixel are computed and not stored.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fxsparse {

// One dimension of a convolution.
struct Axis {
  int64_t input, kernel, stride, padding, dilation;
  int64_t output = 0, first = 0, last = 0, slots = 0;  // taps reach from output slot + first to output slot + last

  Axis(int64_t input, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation)
      : input(input), kernel(kernel), stride(stride), padding(padding), dilation(dilation) {
    const int64_t reach = input + 2 * padding - dilation * (kernel - 1) - 1;
    const bool empty = input == 0 && is_pointwise();  // no pixels in, none out
    TORCH_CHECK_VALUE(reach >= 0 || empty, "the kernel is larger than the padded input: ", input, " pixels, ", kernel, " taps");
    output = reach / stride + 1;
    for (int64_t tap = 0; tap < kernel; ++tap) {
      first = std::min(first, shift(tap));
      last = std::max(last, shift(tap));
    }
    slots = output + last;
    for (int64_t tap = 0; tap < kernel; ++tap) slots = std::max(slots, pixels(phase(tap)) - first);
  }

  bool is_pointwise() const { return kernel == 1 && stride == 1 && padding == 0; }

  int64_t phase(int64_t tap) const { return ((tap * dilation - padding) % stride + stride) % stride; }
  int64_t shift(int64_t tap) const { return (tap * dilation - padding - phase(tap)) / stride; }
  // Pixels of a plane that are read: pixel m of plane f is pixel m * stride + f of the input.
  int64_t pixels(int64_t phase) const {
    const int64_t all = phase < input ? (input - 1 - phase) / stride + 1 : 0;
    return std::min(all, output + last);
  }
};

struct Geometry {
  int64_t images, in_channels, out_channels, groups;
  Axis high, wide;
  int64_t output_height, output_width;
  std::vector<int64_t> planes;    // phase of the rows * stride + phase of the columns, of the planes that taps read
  std::vector<int64_t> plane_of;  // tap -> index into `planes`
  std::vector<int64_t> shift_of;  // tap -> slots

  Geometry(int64_t images, int64_t in_channels, int64_t out_channels, int64_t groups, Axis high_, Axis wide_)
      : images(images), in_channels(in_channels), out_channels(out_channels), groups(groups), high(high_), wide(wide_),
        output_height(high_.output), output_width(wide_.output) {
    if (high.is_pointwise() && wide.is_pointwise()) {
      // Nothing lies between the rows of pixels: a row is the whole image.
      wide = Axis(wide.input * high.input, 1, 1, 0, 1);
      high = Axis(1, 1, 1, 0, 1);
    }
    for (int64_t a = 0; a < high.kernel; ++a) {
      for (int64_t b = 0; b < wide.kernel; ++b) {
        const int64_t plane = high.phase(a) * wide.stride + wide.phase(b);
        const auto found = std::find(planes.begin(), planes.end(), plane);
        plane_of.push_back(found - planes.begin());
        if (found == planes.end()) planes.push_back(plane);
        shift_of.push_back(high.shift(a) * wide.slots + wide.shift(b));
      }
    }
  }

  // Whether every pixel of the input is in a plane that some tap reads.
  bool reads_all() const {
    if (static_cast<int64_t>(planes.size()) < high.stride * wide.stride) return false;
    const auto covers = [](const Axis& axis) {
      for (int64_t phase = 0; phase < axis.stride; ++phase)
        if (axis.pixels(phase) * axis.stride + phase < axis.input) return false;
      return true;
    };
    return covers(high) && covers(wide);
  }

  int64_t taps() const { return high.kernel * wide.kernel; }
  int64_t slots() const { return high.slots * wide.slots; }  // of an image
  int64_t columns() const { return images == 0 ? 0 : images * slots(); }
  int64_t first() const { return high.first * wide.slots + wide.first; }
  int64_t last() const { return high.last * wide.slots + wide.last; }
  int64_t in_per_group() const { return in_channels / groups; }
  int64_t row_length() const { return in_per_group() * taps(); }  // of the weight
};

// A run of slots that holds pixels: `length` of them from `slot` on, at `offset` in the tensor.
struct Run {
  int64_t slot, offset, length;
};

// Strides of an activation in which the pixels of a row lie side by side.
struct Strides {
  int64_t image, channel, row;
};

// A part of an activation: `rows` x `columns` pixels of each image, where pixel (m, n) of the part is pixel
// (m * row_step + row_phase, n * column_step + column_phase) of the activation.
struct Part {
  int64_t rows, columns, row_step = 1, row_phase = 0, column_step = 1, column_phase = 0;
};

// The part of the input that a plane is, and the whole output.
inline Part plane_part(const Geometry& g, int64_t plane) {
  const int64_t row_phase = plane / g.wide.stride, column_phase = plane % g.wide.stride;
  return {g.high.pixels(row_phase), g.wide.pixels(column_phase), g.high.stride, row_phase, g.wide.stride, column_phase};
}
inline Part output_part(const Geometry& g) { return {g.high.output, g.wide.output}; }

// The runs of a part's pixels in slots [from, to).
inline std::vector<Run> runs_between(
    const Geometry& g, const Strides& strides, const Part& part, int64_t from, int64_t to) {
  std::vector<Run> runs;
  if (part.columns <= 0 || part.rows <= 0) return runs;
  const int64_t width = g.wide.slots, end = std::min(to, g.columns());
  for (int64_t slot = std::max<int64_t>(from, 0); slot < end;) {
    const int64_t line = slot / width, column = slot % width;
    const int64_t image = line / g.high.slots, row = line % g.high.slots;
    if (row >= part.rows) {
      slot = (image + 1) * g.slots();
      continue;
    }
    if (column < part.columns) {
      const int64_t length = std::min(part.columns - column, end - slot);
      const int64_t offset = image * strides.image + (row * part.row_step + part.row_phase) * strides.row +
          column * part.column_step + part.column_phase;
      runs.push_back({slot, offset, length});
    }
    slot = (line + 1) * width;
  }
  return runs;
}

}  // namespace fxsparse
