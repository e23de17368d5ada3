#include "worker/task/runtime/torch.h"

#include "worker/task/optim/adamw.h"

#include <cmath>
#include <utility>

namespace refinery::optim {

AdamW::AdamW(std::vector<Parameter> parameters, const AdamWSettings& settings)
    : parameters_(std::move(parameters)), settings_(settings) {
  for (const Parameter& parameter : parameters_) {
    const auto options = parameter.value.options().dtype(at::kFloat).requires_grad(false);
    moments_.push_back({.mean = at::zeros(parameter.value.sizes(), options),
                        .square = at::zeros(parameter.value.sizes(), options),
                        .step = at::zeros({}, at::kLong)});
  }
}

void AdamW::Step(double learning_rate) {
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    at::Tensor value = parameters_[i].value;
    if (!value.grad().defined()) continue;
    const at::Tensor gradient = value.grad().to(at::kFloat);
    Moments& moments = moments_[i];
    moments.step.add_(1);
    const double t = static_cast<double>(moments.step.item<int64_t>());
    if (settings_.weight_decay != 0) value.mul_(1 - learning_rate * settings_.weight_decay);
    moments.mean.lerp_(gradient, 1 - settings_.beta1);
    moments.square.mul_(settings_.beta2).addcmul_(gradient, gradient, 1 - settings_.beta2);
    const double correction1 = 1 - std::pow(settings_.beta1, t);
    const double correction2 = std::sqrt(1 - std::pow(settings_.beta2, t));
    const at::Tensor denominator = moments.square.sqrt().div_(correction2).add_(settings_.epsilon);
    value.addcdiv_(moments.mean.to(value.scalar_type()), denominator.to(value.scalar_type()),
                   -learning_rate / correction1);
  }
}

std::map<std::string, at::Tensor> AdamW::State() const {
  std::map<std::string, at::Tensor> state;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    state[parameters_[i].name + ".mean"] = moments_[i].mean;
    state[parameters_[i].name + ".square"] = moments_[i].square;
    state[parameters_[i].name + ".step"] = moments_[i].step;
  }
  return state;
}

}  // namespace refinery::optim
