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
  const double low = std::max(std::floor(dimension(s.beta_fast)), 0.0);
  double high = std::min(std::ceil(dimension(s.beta_slow)), d - 1);
  if (high == low) high += 0.001;
  const at::Tensor ramp = ((at::arange(head_dim / 2, at::kFloat) - low) / (high - low)).clamp(0, 1);
  return inverse / s.factor * ramp + inverse * (1 - ramp);
}

}  // namespace

RopeFrequencies MakeRopeFrequencies(const ModelConfig& config) {
  const RopeScaling& s = config.rope_scaling;
  const at::Tensor exponent = at::arange(0, config.head_dim, 2, at::kFloat) / static_cast<double>(config.head_dim);
  const at::Tensor inverse = 1.0 / at::pow(config.rope_theta, exponent);
  if (s.type == "linear") return {inverse / s.factor, 1};
  if (s.type == "llama3") return {Llama3(inverse, s), 1};
  if (s.type == "yarn") {
    const double derived = s.factor <= 1 ? 1.0 : 0.1 * std::log(s.factor) + 1.0;
    return {Yarn(inverse, s, config.rope_theta, config.head_dim), s.attention_factor > 0 ? s.attention_factor : derived};
  }
  return {inverse, 1};
}

}  // namespace refinery::model
