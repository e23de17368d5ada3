// worker/task/model/rope.h
//
// The frequencies of the rotary embedding under every scaling that config.h reads.
//
//   linear   every frequency divided by the factor
//   dynamic  the base grows with the sequence: up to max_position the frequencies are the plain ones, beyond they depend on
//            the length of the sequence (NTK-aware scaling)
//   llama3   long wavelengths divided by the factor, short ones kept, those between blended
//   yarn     interpolated, kept and blended by how often a dimension turns; cos and sin scaled (arXiv:2309.00071)
//
// Source: transformers 5.23, modeling_rope_utils.py; float32 and float64 stand where they stand there.
// Threads: const and free functions are thread-safe.

#pragma once

#include <ATen/core/Tensor.h>

#include "worker/task/model/config.h"

namespace refinery::model {

struct RopeFrequencies {
  at::Tensor inverse;    // [d/2] float32, radians per position
  double scaling = 1;    // factor on cos and sin (yarn)
};

// For sequences of up to max_position tokens.
RopeFrequencies MakeRopeFrequencies(const ModelConfig& config);

// The angles per position of "dynamic" in a sequence of `length` tokens, [d/2] float32; length > max_position.
at::Tensor DynamicFrequencies(const ModelConfig& config, int64_t length);

}  // namespace refinery::model
