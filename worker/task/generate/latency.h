// worker/task/generate/latency.h
//
// How long a model takes per generated token, alone on its machine: the number that evaluation reports.

#pragma once

#include <cstdint>

#include "worker/task/model/causal_lm.h"

namespace refinery::generate {

// Median milliseconds of one greedy decoding step of a single sequence with a key-value cache, after a prompt of
// `prompt_tokens` fixed tokens, over `new_tokens` steps (the first few warm up and do not count). Threads: as at::get_num_threads.
double MillisecondsPerToken(const model::CausalLm& model, int64_t prompt_tokens, int64_t new_tokens);

}  // namespace refinery::generate
