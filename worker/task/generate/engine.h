// worker/task/generate/engine.h
//
// Batched text generation with a key-value cache. Requests are submitted at any time, join the batch when there is room, and
// leave it as they finish; a prompt prefix that several share is computed once, and kept for later ones while its place in the
// cache is free.
//
//   Engine engine(model, {.max_batch = 16, .tokenizer = tokenizer});
//   RF_ASSIGN_OR_RETURN(uint64_t id, engine.Submit(request, on_done));   // any thread
//   while (engine.Step()) {}                                             // one thread: a forward pass a call
//   engine.Cancel(id);                                                   // any thread
//
// Generate does the same for a list. With `deterministic` a request's tokens and log-probabilities are the same to the last
// bit whatever shares its batch, and however the others' prompts overlap with its own: prompts are computed in pieces with
// borders at fixed places, never together with decoding, and only whole pieces are shared.
//
// Errors: Status for what a caller asks wrongly or what does not fit; a request whose logits are not finite ends with finish
// reason "error" while the others go on. Exceptions of LibTorch pass through Step.
// Threads: Submit, Cancel and CancelAll may be called by any thread, also from callbacks; Step and Generate by one at a time,
// and callbacks run on that one.

#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "worker/task/generate/request.h"
#include "worker/task/model/causal_lm.h"
#include "worker/task/runtime/reporter.h"
#include "worker/task/tokenizer/tokenizer.h"

namespace refinery::generate {

struct EngineOptions {
  int64_t max_batch = 16;
  // Bytes that the key-value cache may take. Requests that do not fit beside the others wait; one that can never fit is
  // refused. 0 = as much as max_batch requests of the longest length take.
  int64_t memory_budget = 0;
  int64_t min_capacity = 0;        // positions to reserve for each sequence, where the budget allows it: for conversations that grow
  int64_t max_step_tokens = 1024;  // a step computes no more tokens than this (but one for each sequence), so that activations stay small
  bool deterministic = false;
  std::shared_ptr<const tokenizer::Tokenizer> tokenizer;  // for texts, stop strings and constraints; may be null
};

struct EngineStatistics {
  int64_t slots = 0, capacity = 0;    // of the cache: sequences, and positions of each
  int64_t cache_bytes = 0;            // at most
  uint64_t prompt_tokens = 0;         // computed
  uint64_t reused_tokens = 0;         // of prompts, taken from the cache
  uint64_t generated_tokens = 0;
};

class Engine {
 public:
  using OnDone = std::function<void(const Completion&)>;

  Engine(std::shared_ptr<const model::CausalLm> model, const EngineOptions& options);
  ~Engine();

  // Queues a request; returns its id. `on_done` is called once, as it finishes. INVALID_ARGUMENT naming the field that is
  // wrong; RESOURCE_EXHAUSTED when it cannot fit into memory_budget: the message says what it needs.
  StatusOr<uint64_t> Submit(Request request, OnDone on_done = {});
  // Ends a request at the next step with finish reason "cancelled" and what there is of its answer; unknown ids are ignored.
  void Cancel(uint64_t id);
  void CancelAll();
  // Admits requests and computes the next token of each. False when nothing is left to do.
  bool Step();

  // Completions in the order of the requests. Reports tokens generated and tokens per second; `on_done` (optional) is called
  // as each request finishes, with its index. The first request that Submit refuses, or that ends with an error, ends all:
  // its number stands in the message. Throws NumericException for logits that are not finite.
  StatusOr<std::vector<Completion>> Generate(const std::vector<Request>& requests, runtime::Reporter& reporter,
                                             const std::function<void(size_t, const Completion&)>& on_done = {});

  EngineStatistics statistics() const;  // by the thread that calls Step

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace refinery::generate
