#include "worker/task/runtime/torch.h"

#include "worker/task/optim/optimizer.h"

#include <cmath>

namespace refinery::optim {

Status Optimizer::LoadState(const std::map<std::string, at::Tensor>& state) {
  const at::NoGradGuard no_grad;
  const std::map<std::string, at::Tensor> own = State();
  for (const auto& [name, tensor] : state) {
    if (!own.contains(name)) return InvalidArgument("optimizer state: unknown entry '", name, "'");
  }
  for (const auto& [name, tensor] : own) {
    const auto found = state.find(name);
    if (found == state.end()) return InvalidArgument("optimizer state: entry '", name, "' is missing");
    if (found->second.sizes() != tensor.sizes() || found->second.scalar_type() != tensor.scalar_type()) {
      return InvalidArgument("optimizer state: entry '", name, "' has the wrong shape or type");
    }
  }
  for (const auto& [name, tensor] : own) tensor.copy_(state.at(name));
  return absl::OkStatus();
}

double GradientNorm(const std::vector<Parameter>& parameters) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> norms;
  for (const Parameter& parameter : parameters) {
    if (parameter.value.grad().defined()) norms.push_back(parameter.value.grad().to(at::kFloat).norm());
  }
  if (norms.empty()) return 0;
  return at::stack(norms).to(at::kDouble).norm().item<double>();
}

double ClipGradients(const std::vector<Parameter>& parameters, double max_norm) {
  const at::NoGradGuard no_grad;
  const double norm = GradientNorm(parameters);
  if (max_norm <= 0 || !std::isfinite(norm)) return norm;
  const double factor = max_norm / (norm + 1e-6);
  if (factor >= 1) return norm;
  for (const Parameter& parameter : parameters) {
    if (parameter.value.grad().defined()) parameter.value.grad().mul_(factor);
  }
  return norm;
}

void ZeroGradients(const std::vector<Parameter>& parameters) {
  for (const Parameter& parameter : parameters) parameter.value.mutable_grad().reset();
}

}  // namespace refinery::optim
