// worker/task/generate/engine.h
//
// Batched text generation with a KV cache: requests join and leave the batch at each step, and a prompt prefix that several
// requests share is computed once.

#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "worker/task/model/causal_lm.h"
#include "worker/task/runtime/reporter.h"

namespace refinery::generate {

struct SamplingSettings {
  double temperature = 1.0;        // 0 = greedy
  double top_p = 1.0;
  int64_t top_k = 0;               // 0 = off
  double repetition_penalty = 1.0;
};

struct Request {
  std::vector<int32_t> prompt;     // at least one token
  int64_t max_new_tokens = 64;
  SamplingSettings sampling;
  uint64_t seed = 0;               // the request's own stream of random numbers: its text does not depend on its batch mates
  std::vector<int32_t> end_ids;    // generation stops after one of them (it is not part of the output)
  std::vector<std::vector<int32_t>> stop_sequences;  // ids; checked as suffixes, not part of the output
};

struct Completion {
  std::vector<int32_t> tokens;
  std::string finish_reason;       // "end", "stop", "length"
};

struct EngineOptions {
  int64_t max_batch = 16;
};

class Engine {
 public:
  Engine(std::shared_ptr<const model::CausalLm> model, const EngineOptions& options);
  ~Engine();
  // Completions in the order of the requests. Reports tokens generated and tokens per second; `on_done` (optional) is called
  // as each request finishes, with its index.
  std::vector<Completion> Generate(const std::vector<Request>& requests, runtime::Reporter& reporter,
                                   const std::function<void(size_t, const Completion&)>& on_done = {});

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace refinery::generate
