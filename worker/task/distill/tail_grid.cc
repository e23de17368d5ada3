#include "worker/task/runtime/torch.h"

#include "worker/task/distill/tail_grid.h"

#include <cmath>
#include <limits>

namespace refinery::distill {

std::vector<double> TailWeights(double temperature) {
  TORCH_CHECK(temperature >= kMinTemperature && temperature <= kMaxTemperature, "the teacher's tail is known for ",
              "temperatures in [", kMinTemperature, ", ", kMaxTemperature, "], not at ", temperature);
  std::vector<double> weights(kInverseTemperatures.size(), 0.0);
  const double wanted = -std::log2(temperature);
  double total = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const double place = std::log2(kInverseTemperatures[i]);
    if (std::abs(wanted - place) < 1e-12) {
      weights.assign(weights.size(), 0.0);
      weights[i] = 1;
      return weights;
    }
    weights[i] = 1 / (wanted - place);
    for (size_t j = 0; j < weights.size(); ++j) {
      if (j != i) weights[i] /= place - std::log2(kInverseTemperatures[j]);
    }
    total += weights[i];
  }
  for (double& weight : weights) weight /= total;
  return weights;
}

at::Tensor TailLogPartitions(const at::Tensor& tail) {
  const at::NoGradGuard no_grad;
  const double nothing = -std::numeric_limits<double>::infinity();
  const at::Tensor result = at::full({tail.size(0), kGridSize}, nothing, tail.options());
  if (tail.size(1) == 0) return result;
  at::Tensor largest = tail.amax(1, /*keepdim=*/true);
  largest = at::where(at::isneginf(largest), at::zeros_like(largest), largest);
  const at::Tensor below = tail - largest;  // <= 0; the sums of its exponentials are >= 1 unless the tail is empty
  at::Tensor buffer = at::empty_like(below);
  for (int64_t point = 0; point < kGridSize; ++point) {
    const double inverse = kInverseTemperatures[static_cast<size_t>(point)];
    at::mul_out(buffer, below, at::scalar_tensor(inverse, below.options()));
    result.select(1, point).copy_(buffer.exp_().sum(1).log_() + inverse * largest.squeeze(1));
  }
  return result;
}

at::Tensor TailAtTemperature(const at::Tensor& tail_logits, const at::Tensor& tail_log_partitions, double temperature) {
  const at::Tensor plain = tail_logits.to(at::kDouble);
  if (temperature == 1) return plain;
  const at::Tensor weights = at::tensor(TailWeights(temperature), at::kDouble).to(plain.device());
  TORCH_CHECK(tail_log_partitions.defined() && tail_log_partitions.dim() == 2 &&
                  tail_log_partitions.size(0) == plain.size(0) && tail_log_partitions.size(1) == kGridSize,
              "tail_log_partitions must be [", plain.size(0), ", ", kGridSize, "] at temperature ", temperature);
  // Without a tail the grid holds -inf, and the product is no number.
  return at::where(at::isneginf(plain), plain, tail_log_partitions.to(plain.device(), at::kDouble).mv(weights));
}

}  // namespace refinery::distill
