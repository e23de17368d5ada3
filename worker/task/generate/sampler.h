// worker/task/generate/sampler.h
//
// One token from one row of logits, and log-probabilities. The random number depends on (seed, index of the token) only, so
// that a request's text does not depend on what else is in its batch.
//
// Order and meaning of the settings: see request.h. Checked against transformers' logits processors
// (tests/vectors/generate).  Threads: pure functions.

#pragma once

#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

#include "worker/task/generate/request.h"

namespace refinery::generate {

// Uniform in [0, 1), from a counter: SplitMix64 over (seed, index).
double UniformAt(uint64_t seed, uint64_t index);

// The different tokens of a request, and how often its answer holds each: what the penalties look at.
class TokenCounts {
 public:
  struct Count {
    int32_t token;
    int64_t in_answer;
  };
  void AddPrompt(int32_t token) { Find(token); }
  void AddAnswer(int32_t token) { ++Find(token).in_answer; }
  const std::vector<Count>& counts() const { return counts_; }

 private:
  Count& Find(int32_t token);
  std::vector<Count> counts_;
  std::unordered_map<int32_t, size_t> index_;
};

// Whether any penalty is on.
bool HasPenalties(const SamplingSettings& settings);

// A token, or -1 when the logits are not finite (one is NaN or +infinity, or all are -infinity).
// logits [vocab]; modified.  uniform in [0, 1).
int32_t Sample(float* logits, int64_t vocab, const SamplingSettings& settings, const TokenCounts& seen, double uniform);

// The distribution that Sample draws from: tokens with their probabilities, the likeliest first; empty when the logits are not
// finite. logits [vocab]; modified.
std::vector<std::pair<int32_t, double>> Distribution(float* logits, int64_t vocab, const SamplingSettings& settings,
                                                     const TokenCounts& seen);

// Log-softmax in float32 of the row: fills `log_prob` of out->token and the `top` likeliest. All NaN where the row holds one.
// logits [vocab]
void FillLogProbs(const float* logits, int64_t vocab, int64_t top, TokenLogProb* out);

}  // namespace refinery::generate
