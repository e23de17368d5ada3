// worker/task/optim/adamw.h
//
// AdamW with decoupled weight decay, as torch.optim.AdamW of torch 2.11.0 (arXiv:1711.05101).
//
//   W <- W (1 - lr * weight_decay);  m <- m + (1-b1)(g - m);  v <- b2 v + (1-b2) g^2
//   W <- W - lr / (1-b1^t) * m / (sqrt(v) / sqrt(1-b2^t) + epsilon)
//
// Dtypes: state float32, the step counter int64. Errors and threads: see optimizer.h.

#pragma once

#include "worker/task/optim/optimizer.h"

namespace refinery::optim {

struct AdamWSettings {
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;
  double weight_decay = 0;
};

class AdamW final : public Optimizer {
 public:
  AdamW(std::vector<Parameter> parameters, const AdamWSettings& settings);

  void Step(double learning_rate) override;
  std::map<std::string, at::Tensor> State() const override;  // "<name>.mean", "<name>.square", "<name>.step"

 private:
  struct Moments {
    at::Tensor mean;    // m
    at::Tensor square;  // v
    at::Tensor step;    // [] int64 on the CPU: updates made so far
  };

  std::vector<Parameter> parameters_;
  std::vector<Moments> moments_;  // like parameters_
  AdamWSettings settings_;
};

}  // namespace refinery::optim
