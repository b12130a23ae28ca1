// The kernels as functions of tensors. Schemas, gradients and shapes are in fxsparse/kernels/operators.py.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "checks.h"
#include "depthwise.h"
#include "instances.h"
#include "normalisation.h"
#include "pooling.h"
#include "recurrent.h"

namespace fxsparse {
namespace {

// An activation (images, channels, height, width) whose rows of pixels are contiguous and lie one after another.
Tensor regular(const Tensor& x) {
  const bool wide = x.size(3) == 1 || x.stride(3) == 1;
  const bool high = x.size(2) == 1 || x.stride(2) == x.size(3);
  return wide && high ? x : x.transpose(0, 1).contiguous().transpose(0, 1);
}

Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.size(3)}; }

// Room for an activation with channels outermost: all pixels of a channel lie side by side.
Tensor channel_major(const Tensor& like, IntArrayRef shape, bool zero) {
  const std::vector<int64_t> sizes{shape[1], shape[0], shape[2], shape[3]};
  return (zero ? at::zeros(sizes, like.options()) : at::empty(sizes, like.options())).transpose(0, 1);
}

// Images as one long one, where a convolution does not look beyond a pixel and channels are outermost.
bool mergeable(const Settings& s, const Tensor& x) {
  for (int i = 0; i < 2; ++i)
    if (s.weight[2 + i] != 1 || s.stride[i] != 1 || s.padding[i] != 0) return false;
  return x.size(0) == 1 || x.stride(0) == x.size(2) * x.size(3);
}

Tensor merged(const Tensor& x) {
  return x.transpose(0, 1).reshape({1, x.size(1), 1, x.size(0) * x.size(2) * x.size(3)});
}

template <typename Body>
void with_block(int64_t block, const Body& body) {
  switch (block) {
    case 1: return body(std::integral_constant<int, 1>());
    case 2: return body(std::integral_constant<int, 2>());
    case 4: return body(std::integral_constant<int, 4>());
    default: return body(std::integral_constant<int, 8>());  // `Settings::check` lets nothing else pass
  }
}

Rows rows_of(at::TensorList pattern) {
  return {pattern[0].const_data_ptr<int32_t>(), pattern[1].const_data_ptr<int32_t>()};
}

Columns columns_of(at::TensorList pattern) {
  return {pattern[2].const_data_ptr<int32_t>(), pattern[3].const_data_ptr<int32_t>(),
          pattern[4].const_data_ptr<int32_t>()};
}

// `remember`: whether the pattern is one that stays, as for inference.
Tensor convolution(
    const Tensor& x_, const Tensor& values_, at::TensorList pattern, const std::optional<Tensor>& bias_,
    const std::optional<Tensor>& residual_, IntArrayRef weight, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, int64_t groups, int64_t block, std::optional<double> low, std::optional<double> high,
    bool remember) {
  const Settings settings{weight, stride, padding, dilation, groups, block};
  settings.check();
  check_activation("the input", x_, settings.in_channels());
  check_pattern(settings, pattern, false, false);
  check_values(settings, x_, values_, pattern);
  check_bias(settings, bias_, x_);
  Tensor x = regular(x_);
  const Tensor values = values_.contiguous();
  const Geometry whole = settings.geometry(x.size(0), x.size(2), x.size(3));
  Tensor y = channel_major(x, {x.size(0), weight[0], whole.output_height, whole.output_width}, false);
  Tensor target = y, bias, residual;
  if (bias_.has_value()) bias = bias_->contiguous();
  if (residual_.has_value()) {
    TORCH_CHECK_VALUE(
        residual_->sizes() == y.sizes(), "the residual is ", residual_->sizes(), ", the output ", y.sizes());
    check_alike("the residual", *residual_, x);
    residual = residual_->transpose(0, 1).contiguous().transpose(0, 1);
  }
  if (mergeable(settings, x)) {
    x = merged(x);
    target = merged(y);
  }
  const Geometry g = settings.geometry(x.size(0), x.size(2), x.size(3));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sparse_conv2d", [&] {
    Finish<scalar_t> finish;
    if (bias.defined()) finish.bias = bias.const_data_ptr<scalar_t>();
    if (residual.defined()) finish.residual = residual.const_data_ptr<scalar_t>();
    finish.limited = low.has_value() || high.has_value();
    finish.low = low.value_or(-std::numeric_limits<double>::infinity());
    finish.high = high.value_or(std::numeric_limits<double>::infinity());
    if (is_depthwise(g) && block == 1) {
      return depthwise<scalar_t>(
          g, x.const_data_ptr<scalar_t>(), strides_of(x), rows_of(pattern), pattern[1].numel(),
          values.const_data_ptr<scalar_t>(), finish, target.mutable_data_ptr<scalar_t>(), strides_of(target));
    }
    with_block(block, [&](auto r) {
      constexpr int R = decltype(r)::value;
      forward<scalar_t, R>(
          g, x.const_data_ptr<scalar_t>(), strides_of(x), rows_of(pattern), pattern[1].numel(),
          values.const_data_ptr<scalar_t>(), finish, target.mutable_data_ptr<scalar_t>(), strides_of(target),
          remember ? pattern.data() : nullptr);
    });
  });
  return y;
}

Tensor sparse_conv2d_fused(
    const Tensor& x, const Tensor& values, at::TensorList pattern, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& residual, IntArrayRef weight, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, int64_t groups, int64_t block, std::optional<double> low, std::optional<double> high) {
  return convolution(
      x, values, pattern, bias, residual, weight, stride, padding, dilation, groups, block, low, high, true);
}

Tensor sparse_conv2d(
    const Tensor& x, const Tensor& values, at::TensorList pattern, const std::optional<Tensor>& bias, IntArrayRef weight,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, int64_t block) {
  return convolution(x, values, pattern, bias, {}, weight, stride, padding, dilation, groups, block, {}, {}, false);
}

// x (..., inputs) -> (..., outputs). A single vector is not laid out anew; several are pixels of one image.
Tensor sparse_linear_fused(
    const Tensor& x, const Tensor& values_, at::TensorList pattern, const std::optional<Tensor>& bias, int64_t outputs,
    int64_t block, std::optional<double> low, std::optional<double> high) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "expected (..., inputs), got a number");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const int64_t inputs = shape.back();
  int64_t vectors = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) vectors *= shape[i];
  shape.back() = outputs;
  if (vectors == 0 && inputs > 0) return at::empty(shape, x.options());
  const std::vector<int64_t> weight{outputs, inputs, 1, 1}, one{1, 1}, none{0, 0};
  if (vectors != 1) {
    const Tensor pixels = x.reshape({vectors, inputs}).t().unsqueeze(0).unsqueeze(2);
    const Tensor y = sparse_conv2d_fused(pixels, values_, pattern, bias, {}, weight, one, none, one, 1, block, low, high);
    return y.squeeze(2).squeeze(0).t().reshape(shape);
  }
  const Settings settings{weight, one, none, one, 1, block};
  settings.check();
  const Tensor vector = x.reshape({1, inputs, 1, 1}).contiguous(), values = values_.contiguous();
  check_activation("the input", vector, inputs);
  check_pattern(settings, pattern, false);
  check_values(settings, x, values, pattern);
  check_bias(settings, bias, x);
  const Tensor y = at::empty(shape, x.options());
  Tensor added;
  if (bias.has_value()) added = bias->contiguous();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sparse_linear", [&] {
    Finish<scalar_t> finish;
    if (added.defined()) finish.bias = added.const_data_ptr<scalar_t>();
    finish.limited = low.has_value() || high.has_value();
    finish.low = low.value_or(-std::numeric_limits<double>::infinity());
    finish.high = high.value_or(std::numeric_limits<double>::infinity());
    with_block(block, [&](auto r) {
      constexpr int R = decltype(r)::value;
      forward_vector<scalar_t, R>(
          vector.const_data_ptr<scalar_t>(), rows_of(pattern), outputs, values.const_data_ptr<scalar_t>(), finish,
          y.mutable_data_ptr<scalar_t>());
    });
  });
  return y;
}

Tensor sparse_conv2d_input_gradient(
    const Tensor& dy_, const Tensor& x, const Tensor& values_, at::TensorList pattern, IntArrayRef weight,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, int64_t block) {
  const Settings settings{weight, stride, padding, dilation, groups, block};
  settings.check();
  check_activation("the gradient", dy_, weight[0]);
  check_activation("the input", x, settings.in_channels());
  check_pattern(settings, pattern, true);
  check_values(settings, dy_, values_, pattern);
  check_gradient(settings, dy_, x);
  Tensor dy = regular(dy_);
  const Tensor values = values_.contiguous();
  const Columns columns = columns_of(pattern);
  const Geometry whole = settings.geometry(x.size(0), x.size(2), x.size(3));
  Tensor dx = channel_major(dy, x.sizes(), !whole.reads_all()), target = dx;
  if (mergeable(settings, dy)) {
    dy = merged(dy);
    target = merged(dx);
  }
  const Geometry g = settings.geometry(target.size(0), target.size(2), target.size(3));
  AT_DISPATCH_FLOATING_TYPES(dy.scalar_type(), "sparse_conv2d_input_gradient", [&] {
    with_block(block, [&](auto r) {
      constexpr int R = decltype(r)::value;
      input_gradient<scalar_t, R>(
          g, dy.const_data_ptr<scalar_t>(), strides_of(dy), columns, pattern[1].numel(), values.const_data_ptr<scalar_t>(),
          target.mutable_data_ptr<scalar_t>(), strides_of(target));
    });
  });
  return dx;
}

Tensor sparse_conv2d_weight_gradient(
    const Tensor& dy_, const Tensor& x_, at::TensorList pattern, IntArrayRef weight, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, int64_t groups, int64_t block) {
  const Settings settings{weight, stride, padding, dilation, groups, block};
  settings.check();
  check_activation("the gradient", dy_, weight[0]);
  check_activation("the input", x_, settings.in_channels());
  check_pattern(settings, pattern, false);
  check_ascending(pattern);
  check_gradient(settings, dy_, x_);
  Tensor dy = regular(dy_), x = regular(x_);
  if (mergeable(settings, x) && mergeable(settings, dy)) {
    x = merged(x);
    dy = merged(dy);
  }
  const Geometry g = settings.geometry(x.size(0), x.size(2), x.size(3));
  Tensor dvalues = at::zeros({pattern[1].numel() * block}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sparse_conv2d_weight_gradient", [&] {
    with_block(block, [&](auto r) {
      constexpr int R = decltype(r)::value;
      weight_gradient<scalar_t, R>(
          g, x.const_data_ptr<scalar_t>(), strides_of(x), dy.const_data_ptr<scalar_t>(), strides_of(dy), rows_of(pattern),
          pattern[1].numel(), dvalues.mutable_data_ptr<scalar_t>());
    });
  });
  return dvalues;
}

// An activation as (channels, all pixels of a channel).
Tensor rows_of_pixels(const Tensor& x) { return x.transpose(0, 1).reshape({x.size(1), -1}); }

const Tensor optional_rows(const std::optional<Tensor>& x) {
  return x.has_value() ? rows_of_pixels(*x).contiguous() : Tensor();
}

// Returns (y, mean, 1 / standard deviation), the latter two of the batch.
std::tuple<Tensor, Tensor, Tensor> norm_activation(
    const Tensor& x_, const std::optional<Tensor>& residual_, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, double eps, bool relu) {
  TORCH_CHECK_VALUE(x_.dim() == 4, "expected (images, channels, height, width), got ", x_.sizes());
  TORCH_CHECK_VALUE(!residual_.has_value() || residual_->sizes() == x_.sizes(), "the residual has another shape");
  const Tensor x = rows_of_pixels(x_).contiguous(), residual = optional_rows(residual_);
  const Tensor w = weight.has_value() ? weight->contiguous() : Tensor(), b = bias.has_value() ? bias->contiguous() : Tensor();
  const Tensor y = channel_major(x_, x_.sizes(), false);
  const Tensor mean = at::empty({x.size(0)}, x.options()), rstd = at::empty({x.size(0)}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "norm_activation", [&] {
    const auto data = [](const Tensor& t) { return t.defined() ? t.const_data_ptr<scalar_t>() : nullptr; };
    NormForward<scalar_t>{
        data(x), data(residual), data(w), data(b), y.mutable_data_ptr<scalar_t>(), mean.mutable_data_ptr<scalar_t>(),
        rstd.mutable_data_ptr<scalar_t>(), relu, eps, x.size(0), x.size(1)}
        .run();
  });
  return {y, mean, rstd};
}

// Returns (dx, dresidual, dweight, dbias); dresidual is empty where there is no residual.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_activation_backward(
    const Tensor& dy_, const Tensor& x_, const Tensor& y_, const std::optional<Tensor>& weight, const Tensor& mean,
    const Tensor& rstd, bool relu, bool has_residual) {
  const Tensor dy = rows_of_pixels(dy_).contiguous(), x = rows_of_pixels(x_).contiguous();
  const Tensor y = rows_of_pixels(y_).contiguous(), w = weight.has_value() ? weight->contiguous() : Tensor();
  const Tensor dx = channel_major(x_, x_.sizes(), false);
  const Tensor dresidual = has_residual ? channel_major(x_, x_.sizes(), false) : at::empty({0}, x.options());
  const Tensor dweight = at::empty_like(mean), dbias = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "norm_activation_backward", [&] {
    const auto data = [](const Tensor& t) { return t.defined() ? t.const_data_ptr<scalar_t>() : nullptr; };
    NormBackward<scalar_t>{
        data(dy), data(x), data(y), data(w), data(mean), data(rstd), dx.mutable_data_ptr<scalar_t>(),
        has_residual ? dresidual.mutable_data_ptr<scalar_t>() : nullptr, dweight.mutable_data_ptr<scalar_t>(),
        dbias.mutable_data_ptr<scalar_t>(), relu, x.size(0), x.size(1)}
        .run();
  });
  return {dx, dresidual, dweight, dbias};
}

// x (batch, time, 3 padded parts), from the input, and h (batch, hidden) to the states (batch, time, hidden) and the last of them.
std::tuple<Tensor, Tensor> sparse_gru(
    const Tensor& x_, const Tensor& h_, const Tensor& values, at::TensorList tiles, const Tensor& bias) {
  TORCH_CHECK_VALUE(x_.dim() == 3 && h_.dim() == 2 && h_.size(0) == x_.size(0),
                    "expected (batch, time, gates) and (batch, hidden), got ", x_.sizes(), " and ", h_.sizes());
  TORCH_CHECK(x_.size(1) > 0, "a sequence has at least one step");  // as torch.gru
  TORCH_CHECK_VALUE(x_.scalar_type() == values.scalar_type() && h_.scalar_type() == values.scalar_type() &&
                        bias.scalar_type() == values.scalar_type(),
                    "the weights are ", values.scalar_type(), ", the input is ", x_.scalar_type(), ", the state ",
                    h_.scalar_type());
  TORCH_CHECK_VALUE(tiles.size() == 5 && tiles[3].numel() * tile_rows == values.numel(), "expected the tiles of these values");
  const int64_t hidden = h_.size(1);
  TORCH_CHECK_VALUE(bias.numel() == 3 * up_to(hidden, tile_rows) && tiles[4].numel() == hidden && x_.size(2) == bias.numel(), "the weights are not for a state of ", hidden);
  for (const Tensor* part : {&values, &tiles[0], &tiles[1], &tiles[2], &tiles[3], &tiles[4], &bias})
    TORCH_CHECK_VALUE(part->is_contiguous() && part->is_cpu(), "expected contiguous tensors on the CPU");
  const Tensor x = x_.contiguous(), h = h_.contiguous();
  const Tensor states = at::empty({x.size(0), x.size(1), hidden}, x.options()), last = at::empty_like(h);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sparse_gru", [&] {
    const SparseGRU<scalar_t> gru{
        {tiles[0].const_data_ptr<int32_t>(), tiles[0].size(0), tiles[1].const_data_ptr<int32_t>(),
         tiles[2].const_data_ptr<int32_t>(), tiles[3].const_data_ptr<int16_t>(), values.const_data_ptr<scalar_t>()},
        bias.const_data_ptr<scalar_t>(), tiles[4].const_data_ptr<int32_t>(), x.size(1), hidden};
    const auto *xs = x.const_data_ptr<scalar_t>(), *hs = h.const_data_ptr<scalar_t>();
    auto *to = states.mutable_data_ptr<scalar_t>(), *ends = last.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, x.size(0), 1, [&](int64_t from, int64_t until) {
      for (int64_t n = from; n < until; ++n)
        gru.run(xs + n * gru.time * x.size(2), hs + n * hidden, to + n * gru.time * hidden, ends + n * hidden);
    });
  });
  return {states, last};
}

Tensor max_pool2d(const Tensor& x_, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding) {
  check_activation("the input", x_, x_.dim() == 4 ? x_.size(1) : 0);
  TORCH_CHECK_VALUE(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2, "expected two numbers each");
  const Tensor x = regular(x_);
  int64_t size[2];
  for (int i = 0; i < 2; ++i) {
    TORCH_CHECK_VALUE(kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 && 2 * padding[i] <= kernel[i] &&
                          x.size(2 + i) > 0 && x.size(2 + i) + 2 * padding[i] >= kernel[i],
                      "windows of ", kernel, " by ", stride, " with padding ", padding, " over ", x.sizes());
    size[i] = (x.size(2 + i) + 2 * padding[i] - kernel[i]) / stride[i] + 1;
  }
  const Tensor y = channel_major(x, {x.size(0), x.size(1), size[0], size[1]}, false);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "max_pool2d", [&] {
    const MaxPool<scalar_t> pool{
        x.size(2), x.size(3), size[0], size[1], {kernel[0], kernel[1]}, {stride[0], stride[1]}, {padding[0], padding[1]}};
    const Strides from = strides_of(x), to = strides_of(y);
    const auto* pixels = x.const_data_ptr<scalar_t>();
    auto* result = y.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, x.size(0) * x.size(1), 1, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> rows(2 * pool.row_length());
      for (int64_t i = begin; i < end; ++i) {
        const int64_t channel = i / x.size(0), image = i % x.size(0);
        pool.plane(pixels + channel * from.channel + image * from.image,
                   result + channel * to.channel + image * to.image, rows.data());
      }
    });
  });
  return y;
}

Tensor plane_mean(const Tensor& x_) {
  check_activation("the input", x_, x_.dim() == 4 ? x_.size(1) : 0);
  const Tensor x = regular(x_), y = channel_major(x, {x.size(0), x.size(1), 1, 1}, false);
  const int64_t images = x.size(0), count = x.size(2) * x.size(3);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "plane_mean", [&] {
    const Strides from = strides_of(x);
    const auto* pixels = x.const_data_ptr<scalar_t>();
    auto* means = y.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, images * x.size(1), 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        means[i] = mean_of(pixels + i / images * from.channel + i % images * from.image, count);
    });
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(fxsparse, CPU, m) {
  m.impl("sparse_conv2d", &sparse_conv2d);
  m.impl("sparse_conv2d_fused", &sparse_conv2d_fused);
  m.impl("sparse_linear_fused", &sparse_linear_fused);
  m.impl("sparse_gru", &sparse_gru);
  m.impl("max_pool2d", &max_pool2d);
  m.impl("plane_mean", &plane_mean);
  m.impl("norm_activation", &norm_activation);
  m.impl("norm_activation_backward", &norm_activation_backward);
  m.impl("sparse_conv2d_input_gradient", &sparse_conv2d_input_gradient);
  m.impl("sparse_conv2d_weight_gradient", &sparse_conv2d_weight_gradient);
}

}  // namespace fxsparse
