#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <cmath>
#include <numbers>

#include "worker/task/model/rope.h"

namespace refinery::model {
namespace {

// Long wavelengths are stretched by `factor`, short ones kept, those between blended.
at::Tensor Llama3(const at::Tensor& inverse, const RopeScaling& s) {
  const double original = static_cast<double>(s.original_max_position);
  const at::Tensor wavelength = 2 * std::numbers::pi / inverse;
  const at::Tensor smooth = (original / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
  const at::Tensor blended = (1 - smooth) * inverse / s.factor + smooth * inverse;
  const at::Tensor is_long = wavelength > original / s.low_freq_factor;
  const at::Tensor is_short = wavelength < original / s.high_freq_factor;
  return at::where(is_long, inverse / s.factor, at::where(is_short, inverse, blended));
}

// Interpolated (divided by factor) where a dimension turns fewer than beta_slow times over the original context, kept where
// it turns more than beta_fast times, a linear ramp between.
at::Tensor Yarn(const at::Tensor& inverse, const RopeScaling& s, double theta, int64_t head_dim) {
  const double d = static_cast<double>(head_dim);
  const auto dimension = [&](double turns) {
    return d * std::log(static_cast<double>(s.original_max_position) / (turns * 2 * std::numbers::pi)) / (2 * std::log(theta));
  };
  double low = dimension(s.beta_fast), high = dimension(s.beta_slow);
  if (s.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, d - 1);
  if (high == low) high += 0.001;
  const at::Tensor kept = 1 - ((at::arange(head_dim / 2, at::kFloat) - low) / (high - low)).clamp(0, 1);
  return inverse / s.factor * (1 - kept) + inverse * kept;
}

double YarnAttention(const RopeScaling& s) {
  const auto magnitude = [&](double mscale) { return s.factor <= 1 ? 1.0 : 0.1 * mscale * std::log(s.factor) + 1.0; };
  if (s.attention_factor) return *s.attention_factor;
  if (s.mscale != 0 && s.mscale_all_dim != 0) return magnitude(s.mscale) / magnitude(s.mscale_all_dim);
  return magnitude(1);
}

at::Tensor Exponents(int64_t head_dim) { return at::arange(0, head_dim, 2, at::kFloat) / static_cast<double>(head_dim); }

}  // namespace

RopeFrequencies MakeRopeFrequencies(const ModelConfig& config) {
  const RopeScaling& s = config.rope_scaling;
  const at::Tensor inverse = 1.0 / at::pow(config.rope_theta, Exponents(config.head_dim));
  if (s.type == "linear") return {inverse / s.factor, 1};
  if (s.type == "llama3") return {Llama3(inverse, s), 1};
  if (s.type == "yarn") return {Yarn(inverse, s, config.rope_theta, config.head_dim), YarnAttention(s)};
  return {inverse, 1};
}

at::Tensor DynamicFrequencies(const ModelConfig& config, int64_t length) {
  TORCH_CHECK(length > config.max_position && config.head_dim > 2, "DynamicFrequencies: length ", length);
  const double factor = config.rope_scaling.factor, d = static_cast<double>(config.head_dim);
  // The length is a tensor there, so that the base is a float32.
  const at::Tensor stretch = at::scalar_tensor(length, at::kLong) * factor / static_cast<double>(config.max_position) - (factor - 1);
  const at::Tensor base = stretch.pow(d / (d - 2)) * config.rope_theta;
  return 1.0 / at::pow(base, Exponents(config.head_dim));
}

}  // namespace refinery::model
