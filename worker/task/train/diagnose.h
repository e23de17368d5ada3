// worker/task/train/diagnose.h
//
// Where a number stopped being finite. Called only after that has happened; costs one forward pass.

#pragma once

#include <string>
#include <vector>

#include "worker/task/model/causal_lm.h"
#include "worker/task/optim/optimizer.h"

namespace refinery::train {

// "model.layers.3", "model.embed_tokens", "model.norm", or "lm_head" when all hidden states are finite.
std::string FirstNonFiniteLayer(const model::CausalLm& student, const model::PackedBatch& batch);

// The first factor in the order of the backward pass (parameters are given in the order of the forward pass).
std::string FirstNonFiniteGradient(const std::vector<optim::Parameter>& parameters);

}  // namespace refinery::train
