#include "worker/task/runtime/torch.h"

#include "worker/task/optim/muon.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace refinery::optim {
namespace {

double ScaleFactor(MuonScale scale, int64_t rows, int64_t columns) {
  const double m = static_cast<double>(rows);
  const double n = static_cast<double>(columns);
  if (scale == MuonScale::kOriginal) return std::sqrt(std::max(1.0, m / n));
  return 0.2 * std::sqrt(std::max(m, n));
}

}  // namespace

at::Tensor NewtonSchulz(const at::Tensor& matrices, const NewtonSchulzSettings& settings) {
  TORCH_CHECK(matrices.dim() >= 2, "NewtonSchulz: needs matrices, got ", matrices.sizes());
  const at::NoGradGuard no_grad;
  const int64_t rows = matrices.size(-2);
  const int64_t columns = matrices.size(-1);
  at::Tensor x = matrices.reshape({-1, rows, columns}).to(matrices.is_cuda() ? at::kBFloat16 : at::kFloat);
  // The short side first: the Gram matrix is then the small one.
  if (rows > columns) x = x.transpose(1, 2);
  const at::Tensor norm = x.flatten(1).norm(2, {1}).clamp_min(settings.epsilon);
  x = x.div(norm.view({-1, 1, 1}));
  for (int64_t step = 0; step < settings.steps; ++step) {
    const at::Tensor gram = at::bmm(x, x.transpose(1, 2));
    const at::Tensor polynomial = at::baddbmm(gram, gram, gram, settings.b, settings.c);
    x = at::baddbmm(x, polynomial, x, settings.a, 1);
  }
  if (rows > columns) x = x.transpose(1, 2);
  return x.reshape(matrices.sizes()).to(matrices.scalar_type());
}

Muon::Muon(std::vector<Parameter> parameters, const MuonSettings& settings)
    : parameters_(std::move(parameters)), settings_(settings) {
  std::map<std::pair<int64_t, int64_t>, size_t> group_of;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const at::Tensor& value = parameters_[i].value;
    TORCH_CHECK(value.dim() == 2, "Muon: '", parameters_[i].name, "' is not a matrix: ", value.sizes());
    momentum_.push_back(at::zeros(value.sizes(), value.options().dtype(at::kFloat).requires_grad(false)));
    const auto [place, is_new] = group_of.try_emplace({value.size(0), value.size(1)}, groups_.size());
    if (is_new) groups_.emplace_back();
    groups_[place->second].push_back(i);
  }
}

void Muon::Step(double learning_rate) {
  const at::NoGradGuard no_grad;
  for (const std::vector<size_t>& group : groups_) {
    std::vector<size_t> members;
    for (const size_t i : group) {
      if (parameters_[i].value.grad().defined()) members.push_back(i);
    }
    if (!members.empty()) StepGroup(members, learning_rate);
  }
}

void Muon::StepGroup(const std::vector<size_t>& members, double learning_rate) {
  std::vector<at::Tensor> updates;
  updates.reserve(members.size());
  for (const size_t i : members) {
    const at::Tensor gradient = parameters_[i].value.grad().to(at::kFloat);
    momentum_[i].lerp_(gradient, 1 - settings_.momentum);
    updates.push_back(settings_.nesterov ? gradient.lerp(momentum_[i], settings_.momentum) : momentum_[i]);
  }
  const at::Tensor directions = NewtonSchulz(at::stack(updates), settings_.newton_schulz);
  const at::Tensor& first = parameters_[members.front()].value;
  const double step = learning_rate * ScaleFactor(settings_.scale, first.size(0), first.size(1));
  for (size_t k = 0; k < members.size(); ++k) {
    at::Tensor value = parameters_[members[k]].value;
    if (settings_.weight_decay != 0) value.mul_(1 - learning_rate * settings_.weight_decay);
    value.add_(directions[static_cast<int64_t>(k)].to(value.scalar_type()), -step);
  }
}

std::map<std::string, at::Tensor> Muon::State() const {
  std::map<std::string, at::Tensor> state;
  for (size_t i = 0; i < parameters_.size(); ++i) state[parameters_[i].name + ".momentum"] = momentum_[i];
  return state;
}

}  // namespace refinery::optim
