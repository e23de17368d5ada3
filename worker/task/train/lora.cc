#include "worker/task/runtime/torch.h"

#include "worker/task/train/lora.h"

#include <cmath>

#include "common/digest.h"

namespace refinery::train {

LoraFactors::LoraFactors(model::CausalLm* student, int64_t rank, double lora_alpha, uint64_t seed)
    : rank_(rank), lora_alpha_(lora_alpha) {
  for (model::DecoderLayer& layer : student->layers) {
    for (model::Linear* linear : layer.Linears()) {
      TORCH_CHECK(!linear->lora_a.defined(), "LoraFactors: ", linear->name, " has factors already");
      linears_.push_back(linear);
    }
  }
  const auto options = at::TensorOptions(at::kFloat).device(student->device());
  for (model::Linear* linear : linears_) {
    const int64_t out = linear->weight.size(0);
    const int64_t in = linear->weight.size(1);
    const double bound = 1 / std::sqrt(static_cast<double>(in));
    const at::Generator random = at::detail::createCPUGenerator(DeriveSeed(seed, "lora/" + linear->name));
    at::Tensor a = at::rand({rank, in}, random, at::TensorOptions(at::kFloat)).mul_(2 * bound).sub_(bound);
    linear->lora_a = a.to(student->device()).requires_grad_(true);
    linear->lora_b = at::zeros({out, rank}, options).requires_grad_(true);
    linear->lora_scale = lora_alpha / static_cast<double>(rank);
    parameters_.push_back({linear->name + ".lora_A", linear->lora_a});
    parameters_.push_back({linear->name + ".lora_B", linear->lora_b});
  }
}

LoraFactors::~LoraFactors() {
  for (model::Linear* linear : linears_) {
    linear->lora_a = at::Tensor();
    linear->lora_b = at::Tensor();
    linear->lora_scale = 0;
  }
}

checkpoint::PeftAdapter LoraFactors::ToAdapter(const std::string& base_model) const {
  checkpoint::PeftAdapter adapter{.rank = rank_, .lora_alpha = lora_alpha_, .base_model = base_model};
  const auto copy = [](const at::Tensor& value) {
    return value.detach().to(at::kCPU, at::kFloat, false, /*copy=*/true);
  };
  for (const model::Linear* linear : linears_) {
    adapter.pairs[linear->name] = {.a = copy(linear->lora_a), .b = copy(linear->lora_b)};
  }
  return adapter;
}

Status LoraFactors::Load(const checkpoint::PeftAdapter& adapter) {
  const at::NoGradGuard no_grad;
  if (adapter.pairs.size() != linears_.size()) {
    return DataLoss("adapter: has factors of ", adapter.pairs.size(), " layers, the student has ", linears_.size());
  }
  for (model::Linear* linear : linears_) {
    const auto found = adapter.pairs.find(linear->name);
    if (found == adapter.pairs.end()) return DataLoss("adapter: no factors for ", linear->name);
    const checkpoint::LoraPair& pair = found->second;
    if (pair.a.sizes() != linear->lora_a.sizes() || pair.b.sizes() != linear->lora_b.sizes()) {
      return DataLoss("adapter: factors of ", linear->name, " have the wrong shape");
    }
    linear->lora_a.copy_(pair.a);
    linear->lora_b.copy_(pair.b);
  }
  return absl::OkStatus();
}

}  // namespace refinery::train
