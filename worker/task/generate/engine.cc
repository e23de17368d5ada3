#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

#include "worker/task/generate/engine.h"
#include "worker/task/generate/forward.h"
#include "worker/task/generate/sampler.h"

namespace refinery::generate {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kMaxTokensPerStep = 1024;  // prefill is cut into steps of this size, so that activations stay bounded
constexpr int64_t kWorthWaiting = 32;        // tokens of a prefix for which a request waits a step rather than compute them again
constexpr std::chrono::milliseconds kReportEvery{500};

size_t CommonPrefix(const std::vector<int32_t>& a, const std::vector<int32_t>& b) {
  const size_t limit = std::min(a.size(), b.size());
  size_t length = 0;
  while (length < limit && a[length] == b[length]) ++length;
  return length;
}

struct Slot {
  std::vector<int32_t> cached;    // the tokens whose keys and values the cache holds; also after the request has gone
  std::vector<int32_t> tokens;    // prompt and generated tokens of the request that has the slot
  int64_t request = -1;           // -1 = free
  int64_t limit = 0;              // most tokens, prompt included
};

// Whether `text` ends with one of the sequences; `length` becomes its length.
bool EndsWithStop(const Request& request, const std::vector<int32_t>& text, size_t* length) {
  const size_t generated = text.size() - request.prompt.size();
  for (const std::vector<int32_t>& stop : request.stop_sequences) {
    if (!stop.empty() && stop.size() <= generated && std::equal(stop.rbegin(), stop.rend(), text.rbegin())) {
      *length = stop.size();
      return true;
    }
  }
  return false;
}

}  // namespace

struct Engine::Impl {
  Impl(std::shared_ptr<const model::CausalLm> given, const EngineOptions& options)
      : model(std::move(given)), forward(MakeForward(model)), slots(static_cast<size_t>(std::max<int64_t>(1, options.max_batch))) {}

  // One call of Generate.
  struct Batch {
    const std::vector<Request>& requests;
    std::vector<Completion> completions;
    size_t next = 0;  // the first request not admitted yet
    size_t done = 0;
    uint64_t generated = 0;
  };

  void Start(const std::vector<Request>& requests);
  void Admit(Batch& batch);
  bool AdmitNext(Batch& batch);
  StepBatch NextStep() const;
  void Advance(Batch& batch, const StepBatch& step, const at::Tensor& logits, std::vector<size_t>& finished);
  bool Append(Batch& batch, Slot& slot, int32_t token);

  std::shared_ptr<const model::CausalLm> model;
  std::unique_ptr<Forward> forward;
  std::vector<Slot> slots;
};

Engine::Engine(std::shared_ptr<const model::CausalLm> model, const EngineOptions& options)
    : impl_(std::make_unique<Impl>(std::move(model), options)) {}
Engine::~Engine() = default;

// Checks the requests and makes room for the longest.
void Engine::Impl::Start(const std::vector<Request>& requests) {
  const model::ModelConfig& config = model->config();
  int64_t capacity = 1;
  for (const Request& request : requests) {
    const auto prompt = static_cast<int64_t>(request.prompt.size());
    TORCH_CHECK(prompt >= 1 && prompt <= config.max_position, "a prompt of ", prompt, " tokens; the model takes 1 to ",
                config.max_position);
    for (int32_t token : request.prompt) TORCH_CHECK(token >= 0 && token < config.vocab_size, "prompt token ", token);
    capacity = std::max(capacity, std::min(prompt + request.max_new_tokens, config.max_position));
  }
  forward->Reserve(static_cast<int64_t>(slots.size()), capacity);
  for (Slot& slot : slots) slot = Slot();
}

// Gives a free slot to the next request, with the longest prefix that any slot has cached. False when there is no free slot,
// no request, or the request better waits for a prefix that is being computed.
bool Engine::Impl::AdmitNext(Batch& batch) {
  if (batch.next == batch.requests.size()) return false;
  const Request& request = batch.requests[batch.next];
  size_t longest = 0, coming = 0, source = slots.size(), target = slots.size();
  for (size_t i = 0; i < slots.size(); ++i) {
    const size_t common = CommonPrefix(slots[i].cached, request.prompt);
    if (common > longest || source == slots.size()) {
      longest = common;
      source = i;
    }
    if (slots[i].request >= 0) coming = std::max(coming, CommonPrefix(slots[i].tokens, request.prompt));
    if (slots[i].request < 0 && (target == slots.size() || slots[i].cached.size() < slots[target].cached.size())) target = i;
  }
  if (target == slots.size() || coming > longest + kWorthWaiting) return false;
  longest = std::min(longest, request.prompt.size() - 1);  // the last token's logits are wanted
  if (slots[source].request < 0) {
    target = source;
  } else if (longest > 0) {
    forward->CopyPrefix(static_cast<int64_t>(source), static_cast<int64_t>(target), static_cast<int64_t>(longest));
  }
  Slot& slot = slots[target];
  slot.cached.assign(request.prompt.begin(), request.prompt.begin() + static_cast<std::ptrdiff_t>(longest));
  slot.tokens = request.prompt;
  slot.request = static_cast<int64_t>(batch.next++);
  slot.limit = std::min<int64_t>(static_cast<int64_t>(request.prompt.size()) + request.max_new_tokens, model->config().max_position);
  return true;
}

// Every occupied slot's next tokens: one when decoding, a piece of the prompt before.
StepBatch Engine::Impl::NextStep() const {
  StepBatch step;
  int64_t room = std::max<int64_t>(kMaxTokensPerStep, static_cast<int64_t>(slots.size()));
  for (size_t i = 0; i < slots.size(); ++i) {
    const Slot& slot = slots[i];
    if (slot.request < 0) continue;
    const auto start = static_cast<int64_t>(slot.cached.size()), total = static_cast<int64_t>(slot.tokens.size());
    const int64_t count = std::min(total - start, room);
    if (count == 0) continue;
    room -= count;
    step.runs.push_back({static_cast<int64_t>(i), start, count, start + count == total});
    step.token_ids.insert(step.token_ids.end(), slot.tokens.begin() + start, slot.tokens.begin() + start + count);
  }
  return step;
}

// Adds a sampled token. Returns whether the request is finished; its completion is then in place.
bool Engine::Impl::Append(Batch& batch, Slot& slot, int32_t token) {
  const auto index = static_cast<size_t>(slot.request);
  const Request& request = batch.requests[index];
  Completion& completion = batch.completions[index];
  const auto prompt = static_cast<std::ptrdiff_t>(request.prompt.size());
  size_t stop_length = 0;
  if (std::ranges::find(request.end_ids, token) != request.end_ids.end()) {
    completion.finish_reason = "end";
  } else {
    slot.tokens.push_back(token);
    if (EndsWithStop(request, slot.tokens, &stop_length)) {
      completion.finish_reason = "stop";
    } else if (static_cast<int64_t>(slot.tokens.size()) >= slot.limit) {
      completion.finish_reason = "length";
    } else {
      return false;
    }
  }
  completion.tokens.assign(slot.tokens.begin() + prompt, slot.tokens.end() - static_cast<std::ptrdiff_t>(stop_length));
  slot.request = -1;
  slot.tokens.clear();
  return true;
}

// Notes what the step cached and samples where logits came.
void Engine::Impl::Advance(Batch& batch, const StepBatch& step, const at::Tensor& logits, std::vector<size_t>& finished) {
  std::vector<Slot*> sampled;
  for (const Run& run : step.runs) {
    Slot& slot = slots[static_cast<size_t>(run.slot)];
    slot.cached.insert(slot.cached.end(), slot.tokens.begin() + run.start, slot.tokens.begin() + run.start + run.count);
    if (run.wants_logits) sampled.push_back(&slot);
  }
  const int64_t vocab = logits.size(1);
  std::vector<int32_t> tokens(sampled.size());
  at::parallel_for(0, static_cast<int64_t>(sampled.size()), 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Slot& slot = *sampled[static_cast<size_t>(i)];
      const Request& request = batch.requests[static_cast<size_t>(slot.request)];
      const uint64_t count = slot.tokens.size() - request.prompt.size();
      tokens[static_cast<size_t>(i)] = Sample(logits.data_ptr<float>() + i * vocab, vocab, request.sampling, slot.tokens,
                                              UniformAt(request.seed, count));
    }
  });
  batch.generated += sampled.size();
  for (size_t i = 0; i < sampled.size(); ++i) {
    const auto index = static_cast<size_t>(sampled[i]->request);
    if (tokens[i] < 0) throw runtime::NumericException("the logits of a generated token are not finite");
    if (Append(batch, *sampled[i], tokens[i])) finished.push_back(index);
  }
}

void Engine::Impl::Admit(Batch& batch) {
  while (AdmitNext(batch)) {
  }
}

std::vector<Completion> Engine::Generate(const std::vector<Request>& requests, runtime::Reporter& reporter,
                                         const std::function<void(size_t, const Completion&)>& on_done) {
  const c10::InferenceMode inference;
  Impl& impl = *impl_;
  impl.Start(requests);
  Impl::Batch batch{.requests = requests, .completions = std::vector<Completion>(requests.size())};
  const Clock::time_point start = Clock::now();
  Clock::time_point reported = start;
  const auto report = [&] {
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    reporter.Report({.phase = "generating",
                     .done = static_cast<double>(batch.done),
                     .total = static_cast<double>(requests.size()),
                     .tokens_per_second = static_cast<double>(batch.generated) / std::max(seconds, 1e-9),
                     .tokens_generated = batch.generated});
    reported = Clock::now();
  };
  std::vector<size_t> finished;
  while (batch.done < requests.size()) {
    reporter.Check();
    impl.Admit(batch);
    finished.clear();
    for (Slot& slot : impl.slots) {  // nothing to generate
      if (slot.request < 0 || slot.limit > static_cast<int64_t>(slot.tokens.size())) continue;
      finished.push_back(static_cast<size_t>(slot.request));
      batch.completions[finished.back()].finish_reason = "length";
      slot.request = -1;
    }
    const StepBatch step = impl.NextStep();
    if (!step.runs.empty()) impl.Advance(batch, step, impl.forward->Step(step), finished);
    batch.done += finished.size();
    if (on_done) {
      for (size_t index : finished) on_done(index, batch.completions[index]);
    }
    if (Clock::now() - reported >= kReportEvery) report();
  }
  report();
  return batch.completions;
}

}  // namespace refinery::generate
