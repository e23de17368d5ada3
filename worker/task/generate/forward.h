// worker/task/generate/forward.h
//
// The model's forward pass over a key-value cache: packed new tokens of several slots in, logits out. Two implementations:
// hand-written kernels for float32 and bfloat16 models on the CPU, plain ATen for everything else (CUDA, attached adapters).
//
// A slot is one sequence in the cache; its positions [0, length) are filled in order.
// Errors: c10::Error on misuse.  Threads: one caller at a time.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "worker/task/model/causal_lm.h"

namespace refinery::generate {

// Consecutive new tokens of one slot: positions [start, start + count). The slot's cache holds [0, start).
struct Run {
  int64_t slot = 0, start = 0, count = 0;
  bool wants_logits = false;  // of its last token
};

// Which way a step is computed. kDecode and kPrompt fix the way, so that the same token at the same place of the same sequence
// never goes one way in one batch and another way in the next.
enum class StepKind {
  kAny,     // the fastest for this many tokens
  kDecode,  // runs of one token each
  kPrompt,  // pieces of prompts, of any length
};

struct StepBatch {
  std::vector<int64_t> token_ids;  // of all runs, end to end
  std::vector<Run> runs;           // different slots
  StepKind kind = StepKind::kAny;
};

class Forward {
 public:
  virtual ~Forward() = default;
  // Makes room for `slots` sequences of `capacity` tokens each; what the cache held is gone when it had to grow.
  // Returns whether it grew.
  virtual bool Reserve(int64_t slots, int64_t capacity) = 0;
  // Frees the cache, so that the next Reserve may give fewer slots or less room than the last.
  virtual void Release() = 0;
  // Bytes that Reserve takes at most, on empty hands, for the cache and what grows with it.
  virtual int64_t CacheBytes(int64_t slots, int64_t capacity) const = 0;
  // The first `length` positions of slot `to` become those of slot `from`.
  virtual void CopyPrefix(int64_t from, int64_t to, int64_t length) = 0;
  // Fills the cache; returns logits of the runs that want them, in their order: [R, V] float32 on the CPU.
  virtual at::Tensor Step(const StepBatch& batch) = 0;
  // Whether in a step of this kind a token's result depends on its own sequence alone, to the last bit: what else is in the
  // step changes nothing. Where it does not hold, the engine's deterministic mode puts one run into a step.
  virtual bool RowInvariant(StepKind kind) const = 0;
};

// The implementation that suits the model. The model must not change while the object lives.
std::unique_ptr<Forward> MakeForward(std::shared_ptr<const model::CausalLm> model);
std::unique_ptr<Forward> MakeAtenForward(std::shared_ptr<const model::CausalLm> model);
std::unique_ptr<Forward> MakeCpuForward(std::shared_ptr<const model::CausalLm> model);

}  // namespace refinery::generate
