#include "worker/task/runtime/torch.h"

#include "worker/task/train/diagnose.h"

#include "common/status.h"

namespace refinery::train {
namespace {

bool AllFinite(const at::Tensor& tensor) { return at::isfinite(tensor).all().item<bool>(); }

}  // namespace

std::string FirstNonFiniteLayer(const model::CausalLm& student, const model::PackedBatch& batch) {
  const at::NoGradGuard no_grad;
  const model::Rotary rotary = student.MakeRotary(batch.lengths);
  at::Tensor hidden = student.Embed(batch.token_ids.to(student.device()));
  if (!AllFinite(hidden)) return "model.embed_tokens";
  for (size_t i = 0; i < student.layers.size(); ++i) {
    hidden = student.ForwardLayer(student.layers[i], hidden, batch.lengths, rotary);
    if (!AllFinite(hidden)) return Join("model.layers.", i);
  }
  return AllFinite(student.Normalize(hidden, student.final_norm)) ? "lm_head" : "model.norm";
}

std::string FirstNonFiniteGradient(const std::vector<optim::Parameter>& parameters) {
  for (auto parameter = parameters.rbegin(); parameter != parameters.rend(); ++parameter) {
    const at::Tensor gradient = parameter->value.grad();
    if (gradient.defined() && !AllFinite(gradient)) return parameter->name;
  }
  return "the norm over all factors";
}

}  // namespace refinery::train
