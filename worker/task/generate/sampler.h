// worker/task/generate/sampler.h
//
// One token from one row of logits. The random number depends on (seed, index of the token) only, so that a request's text
// does not depend on what else is in its batch.
//
// Order of the settings as in transformers: repetition penalty, temperature, top-k, top-p.  Threads: pure functions.

#pragma once

#include <cstdint>
#include <vector>

#include "worker/task/generate/engine.h"

namespace refinery::generate {

// Uniform in [0, 1), from a counter: SplitMix64 over (seed, index).
double UniformAt(uint64_t seed, uint64_t index);

// A token, or -1 when the logits are not finite.
// logits [vocab]; modified. `seen` holds the tokens that the repetition penalty applies to (prompt and generated).
int32_t Sample(float* logits, int64_t vocab, const SamplingSettings& settings, const std::vector<int32_t>& seen, double uniform);

}  // namespace refinery::generate
