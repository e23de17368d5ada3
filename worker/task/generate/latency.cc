#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <algorithm>
#include <chrono>

#include "worker/task/generate/forward.h"
#include "worker/task/generate/latency.h"

namespace refinery::generate {
namespace {

constexpr int64_t kWarmUpSteps = 4;

}  // namespace

double MillisecondsPerToken(const model::CausalLm& model, int64_t prompt_tokens, int64_t new_tokens) {
  TORCH_CHECK(prompt_tokens >= 1 && new_tokens >= 1, "MillisecondsPerToken: ", prompt_tokens, " and ", new_tokens, " tokens");
  const c10::InferenceMode inference;
  // The caller keeps the model alive.
  const auto forward = MakeForward(std::shared_ptr<const model::CausalLm>(std::shared_ptr<void>(), &model));
  const int64_t steps = new_tokens + kWarmUpSteps;
  forward->Reserve(1, prompt_tokens + steps);
  StepBatch batch;
  for (int64_t i = 0; i < prompt_tokens; ++i) batch.token_ids.push_back((i * 7 + 3) % model.config().vocab_size);
  batch.runs = {{.slot = 0, .start = 0, .count = prompt_tokens, .wants_logits = true}};
  at::Tensor logits = forward->Step(batch);
  std::vector<double> milliseconds;
  for (int64_t i = 0; i < steps; ++i) {
    const auto start = std::chrono::steady_clock::now();
    batch.token_ids = {logits[0].argmax().item<int64_t>()};
    batch.runs = {{.slot = 0, .start = prompt_tokens + i, .count = 1, .wants_logits = true}};
    logits = forward->Step(batch);
    const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;
    if (i >= kWarmUpSteps) milliseconds.push_back(elapsed.count());
  }
  const auto middle = milliseconds.begin() + static_cast<std::ptrdiff_t>(milliseconds.size() / 2);
  std::nth_element(milliseconds.begin(), middle, milliseconds.end());
  return *middle;
}

}  // namespace refinery::generate
