// worker/task/optim/optimizer.h
//
// What the training loop needs from an optimizer: a step, and a state that can be stored by parameter name.
//
// A parameter without a gradient is left alone (as in torch.optim). All updates run without autograd.
// Errors: INVALID_ARGUMENT from LoadState naming the missing or misshapen entry; c10::Error on shape bugs.
// Threads: one optimizer per training loop.

#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

#include "common/status.h"

namespace refinery::optim {

struct Parameter {
  std::string name;  // unique; the key of its state
  at::Tensor value;  // leaf tensor; its .grad() is read by Step
};

class Optimizer {
 public:
  virtual ~Optimizer() = default;

  // One update of every parameter from its gradient.
  virtual void Step(double learning_rate) = 0;

  // "<parameter>.<what>" -> tensor. The tensors are the live state: store them before the next Step.
  virtual std::map<std::string, at::Tensor> State() const = 0;
  // Copies `state` in. Every entry that State() names must be there with the same shape, and no other.
  Status LoadState(const std::map<std::string, at::Tensor>& state);
};

// The L2 norm over all gradients, in float32 per parameter and double across them. 0 when there is none.
double GradientNorm(const std::vector<Parameter>& parameters);

// Scales all gradients so that their common norm is at most `max_norm` (torch.nn.utils.clip_grad_norm_: factor
// max_norm / (norm + 1e-6), never above 1). Returns the norm before. max_norm <= 0 only measures.
double ClipGradients(const std::vector<Parameter>& parameters, double max_norm);

void ZeroGradients(const std::vector<Parameter>& parameters);

}  // namespace refinery::optim
