// worker/task/optim/muon.h
//
// Muon: momentum, then the update's nearest semi-orthogonal matrix by Newton-Schulz, then a step of matched size.
//
//   M <- M + (1 - momentum) (g - M)          u = nesterov ? g + momentum (M - g) : M
//   W <- W (1 - learning_rate * weight_decay) - learning_rate * factor(shape) * NewtonSchulz(u)
//
// Source: torch.optim.Muon of torch 2.11.0, whose results it gives (there the iteration always runs in bfloat16);
// Keller Jordan's post for the coefficients (kellerjordan.github.io/posts/muon); arXiv:2502.16982 for kMatchRmsAdamW.
// Shapes: parameters are 2-D. Equal shapes are iterated as one batch, a few products for all LoRA factors of a kind.
// Dtypes: state float32; iteration bfloat16 on CUDA, float32 on CPU.
// Errors: c10::Error if a parameter is not 2-D (a bug, never user input).  Threads: one optimizer per training loop.

#pragma once

#include "worker/task/optim/optimizer.h"

namespace refinery::optim {

enum class MuonScale {
  kOriginal,       // sqrt(max(1, rows / columns))
  kMatchRmsAdamW,  // 0.2 sqrt(max(rows, columns)): a learning rate found for AdamW carries over
};

struct NewtonSchulzSettings {
  double a = 3.4445;
  double b = -4.7750;
  double c = 2.0315;
  int64_t steps = 5;
  double epsilon = 1e-7;  // smallest norm divided by; a zero matrix stays zero
};

struct MuonSettings {
  double momentum = 0.95;
  bool nesterov = true;
  double weight_decay = 0;
  MuonScale scale = MuonScale::kMatchRmsAdamW;
  NewtonSchulzSettings newton_schulz;
};

// [..., m, n] -> the same shape and dtype: U S' V^T of each matrix, S' in about [0.68, 1.15] for singular values that
// are not tiny against the largest. Iterates in bfloat16 on CUDA, float32 on CPU.
at::Tensor NewtonSchulz(const at::Tensor& matrices, const NewtonSchulzSettings& settings);

class Muon final : public Optimizer {
 public:
  Muon(std::vector<Parameter> parameters, const MuonSettings& settings);

  void Step(double learning_rate) override;
  std::map<std::string, at::Tensor> State() const override;  // "<name>.momentum"

 private:
  void StepGroup(const std::vector<size_t>& members, double learning_rate);

  std::vector<Parameter> parameters_;
  std::vector<at::Tensor> momentum_;          // like parameters_
  std::vector<std::vector<size_t>> groups_;   // indices of equal shape, in order of first appearance
  MuonSettings settings_;
};

}  // namespace refinery::optim
