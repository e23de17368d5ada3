// worker/task/model/rope.h
//
// The frequencies of the rotary embedding under every scaling that config.h reads.
//
// Source: transformers 5, modeling_rope_utils.py (default, linear, llama3, yarn); arXiv:2309.00071 for yarn. "dynamic" equals
// "default" up to max_position; positions beyond it are refused where they are used.

#pragma once

#include <ATen/core/Tensor.h>

#include "worker/task/model/config.h"

namespace refinery::model {

struct RopeFrequencies {
  at::Tensor inverse;    // [d/2] float32, radians per position
  double scaling = 1;    // factor on cos and sin (yarn)
};

RopeFrequencies MakeRopeFrequencies(const ModelConfig& config);

}  // namespace refinery::model
