#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <algorithm>
#include <chrono>
#include <deque>
#include <mutex>
#include <set>

#include "worker/task/generate/cache_layout.h"
#include "worker/task/generate/engine.h"
#include "worker/task/generate/forward.h"
#include "worker/task/generate/sequence.h"
#include "worker/task/generate/step_plan.h"

namespace refinery::generate {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kWorthWaiting = 32;  // tokens of a prefix for which a request waits a step rather than compute them again
constexpr std::chrono::milliseconds kReportEvery{500};

size_t CommonPrefix(const std::vector<int32_t>& a, const std::vector<int32_t>& b) {
  const size_t limit = std::min(a.size(), b.size());
  size_t length = 0;
  while (length < limit && a[length] == b[length]) ++length;
  return length;
}

struct Slot {
  std::vector<int32_t> cached;         // the tokens whose keys and values the cache holds; also after the request has gone
  int64_t whole = 0;                   // deterministic: positions of whole pieces of a prompt, which others may share
  std::unique_ptr<Sequence> sequence;  // null = free
};

}  // namespace

struct Engine::Impl {
  Impl(std::shared_ptr<const model::CausalLm> given, const EngineOptions& wished)
      : model(std::move(given)), options(wished), forward(MakeForward(model)) {
    options.max_batch = std::max<int64_t>(1, options.max_batch);
    options.max_step_tokens = std::max(options.max_step_tokens, options.max_batch + 1);  // some prompt always advances
    limits = {.max_slots = options.max_batch,
              .min_capacity = std::min(options.min_capacity, model->config().max_position),
              .budget = options.memory_budget,
              .bytes = [this](int64_t slot_count, int64_t positions) { return forward->CacheBytes(slot_count, positions); }};
  }

  int64_t LimitOf(const Request& request) const {
    return std::min(static_cast<int64_t>(request.prompt.size()) + request.max_new_tokens, model->config().max_position);
  }
  Status Check(const Request& request) const;
  StatusOr<std::unique_ptr<tokenizer::TokenConstraint>> MakeConstraint(const Constraint& constraint);
  void TakeSubmitted();
  bool Idle() const;
  bool Relayout();
  void Admit();
  bool AdmitNext();
  // Of a prefix that is the same, what may be shared.
  int64_t Whole(size_t common) const {
    const auto length = static_cast<int64_t>(common);
    return options.deterministic ? length / kFixedPiece * kFixedPiece : length;
  }
  int64_t Shareable(const Slot& slot, const std::vector<int32_t>& prompt) const;
  std::vector<StepBatch> NextSteps() const;
  void Advance(const StepBatch& step, const at::Tensor& logits);
  void Drop(const std::set<uint64_t>& ids);

  const std::shared_ptr<const model::CausalLm> model;
  EngineOptions options;
  const std::unique_ptr<Forward> forward;
  CacheLimits limits;

  std::mutex mutex;  // guards what other threads may change
  std::vector<std::unique_ptr<Sequence>> submitted;
  std::set<uint64_t> cancelled;
  bool all_cancelled = false;
  uint64_t last_id = 0;
  std::shared_ptr<const tokenizer::ConstraintFactory> constraints;  // made when first needed

  // Of the thread that calls Step.
  std::deque<std::unique_ptr<Sequence>> waiting;
  std::vector<Slot> slots;
  int64_t capacity = 0;
  EngineStatistics statistics;
};

Engine::Engine(std::shared_ptr<const model::CausalLm> model, const EngineOptions& options)
    : impl_(std::make_unique<Impl>(std::move(model), options)) {}
Engine::~Engine() = default;

Status Engine::Impl::Check(const Request& request) const {
  const model::ModelConfig& config = model->config();
  const auto prompt = static_cast<int64_t>(request.prompt.size());
  if (prompt < 1 || prompt > config.max_position)
    return InvalidArgument("the prompt has ", prompt, " tokens; the model takes 1 to ", config.max_position);
  for (int32_t token : request.prompt) {
    if (token < 0 || token >= config.vocab_size)
      return InvalidArgument("the prompt holds the token ", token, "; the model knows 0 to ", config.vocab_size - 1);
  }
  if (request.max_new_tokens < 0) return InvalidArgument("max_new_tokens is ", request.max_new_tokens, "; it must not be negative");
  RF_RETURN_IF_ERROR(CheckSampling(request.sampling));
  if (options.tokenizer == nullptr && (!request.stop_strings.empty() || request.constraint.kind != Constraint::Kind::kNone))
    return InvalidArgument("stop_strings and constraint need an engine with a tokenizer (EngineOptions)");
  const int64_t positions = LimitOf(request);
  if (CanFit(limits, positions)) return absl::OkStatus();
  return ResourceExhausted("the key-value cache of ", positions, " tokens (prompt ", prompt, ", new at most ", positions - prompt,
                           ") takes ", forward->CacheBytes(1, positions), " bytes; memory_budget allows ", limits.budget,
                           ": raise it, or ask for fewer max_new_tokens");
}

StatusOr<std::unique_ptr<tokenizer::TokenConstraint>> Engine::Impl::MakeConstraint(const Constraint& constraint) {
  if (constraint.kind == Constraint::Kind::kNone) return std::unique_ptr<tokenizer::TokenConstraint>();
  std::shared_ptr<const tokenizer::ConstraintFactory> factory;
  {
    const std::lock_guard lock(mutex);
    if (constraints == nullptr) {
      RF_ASSIGN_OR_RETURN(constraints, tokenizer::ConstraintFactory::Make(*options.tokenizer, model->config().vocab_size));
    }
    factory = constraints;
  }
  if (constraint.kind == Constraint::Kind::kJsonSchema) return factory->FromJsonSchema(constraint.source);
  if (constraint.kind == Constraint::Kind::kRegex) return factory->FromRegex(constraint.source);
  return factory->FromLark(constraint.source);
}

StatusOr<uint64_t> Engine::Submit(Request request, OnDone on_done) {
  Impl& impl = *impl_;
  RF_RETURN_IF_ERROR(impl.Check(request));
  Sequence::Parts parts{.limit = impl.LimitOf(request), .tokenizer = impl.options.tokenizer, .on_done = std::move(on_done)};
  RF_ASSIGN_OR_RETURN(parts.constraint, impl.MakeConstraint(request.constraint));
  if (parts.constraint != nullptr) {
    const std::vector<int32_t>& ends = impl.options.tokenizer->end_ids();
    request.end_ids.insert(request.end_ids.end(), ends.begin(), ends.end());
  }
  parts.request = std::move(request);
  const std::lock_guard lock(impl.mutex);
  impl.submitted.push_back(std::make_unique<Sequence>(++impl.last_id, std::move(parts)));
  return impl.last_id;
}

void Engine::Cancel(uint64_t id) {
  const std::lock_guard lock(impl_->mutex);
  impl_->cancelled.insert(id);
}

void Engine::CancelAll() {
  const std::lock_guard lock(impl_->mutex);
  for (const std::unique_ptr<Sequence>& sequence : impl_->submitted) impl_->cancelled.insert(sequence->id());
  impl_->all_cancelled = true;
}

// Queues what was submitted and ends what was cancelled. Callbacks run without the lock.
void Engine::Impl::TakeSubmitted() {
  std::set<uint64_t> ids;
  bool all = false;
  {
    const std::lock_guard lock(mutex);
    ids.swap(cancelled);
    std::swap(all, all_cancelled);
    // Those that came after CancelAll are not in `ids`.
    if (all) {
      for (const std::unique_ptr<Sequence>& sequence : waiting) ids.insert(sequence->id());
      for (const Slot& slot : slots) ids.insert(slot.sequence == nullptr ? 0 : slot.sequence->id());
    }
    for (std::unique_ptr<Sequence>& sequence : submitted) waiting.push_back(std::move(sequence));
    submitted.clear();
  }
  if (ids.empty()) return;
  std::vector<std::unique_ptr<Sequence>> ended;
  for (Slot& slot : slots) {
    if (slot.sequence != nullptr && ids.contains(slot.sequence->id())) ended.push_back(std::move(slot.sequence));
  }
  for (std::unique_ptr<Sequence>& sequence : waiting) {
    if (ids.contains(sequence->id())) ended.push_back(std::move(sequence));
  }
  std::erase(waiting, nullptr);
  for (const std::unique_ptr<Sequence>& sequence : ended) sequence->Finish("cancelled");
}

// Removes requests without a word to anybody: their caller has gone.
void Engine::Impl::Drop(const std::set<uint64_t>& ids) {
  const std::lock_guard lock(mutex);
  const auto dropped = [&](const std::unique_ptr<Sequence>& s) { return s != nullptr && ids.contains(s->id()); };
  std::erase_if(submitted, dropped);
  std::erase_if(waiting, dropped);
  for (Slot& slot : slots) {
    if (dropped(slot.sequence)) slot.sequence.reset();
  }
}

bool Engine::Impl::Idle() const {
  return std::ranges::all_of(slots, [](const Slot& slot) { return slot.sequence == nullptr; });
}

// Sees that the cache has room for the first waiting request. False while others must leave before it can be laid out anew:
// for a longer request, or for many short ones after a long one.
bool Engine::Impl::Relayout() {
  const int64_t first = waiting.front()->limit(), slot_count = static_cast<int64_t>(slots.size());
  const bool enough = first <= capacity, all_slots = slot_count == limits.max_slots;
  if (enough && all_slots) return true;
  std::vector<int64_t> needs;
  for (const std::unique_ptr<Sequence>& sequence : waiting) needs.push_back(sequence->limit());
  const CacheLayout layout = ChooseLayout(limits, needs);
  const auto long_one = [&](const Slot& slot) { return slot.sequence != nullptr && slot.sequence->limit() > layout.capacity; };
  const bool worth = layout.slots >= 2 * slot_count && static_cast<int64_t>(waiting.size()) > slot_count &&
                     std::ranges::none_of(slots, long_one);
  if (enough && !worth) return true;
  if (!Idle()) return false;
  forward->Release();
  slots.clear();
  forward->Reserve(layout.slots, layout.capacity);
  slots.resize(static_cast<size_t>(layout.slots));
  capacity = layout.capacity;
  statistics.slots = layout.slots;
  statistics.capacity = layout.capacity;
  statistics.cache_bytes = forward->CacheBytes(layout.slots, layout.capacity);
  return true;
}

// Positions of the slot's cache that the prompt may take over.
int64_t Engine::Impl::Shareable(const Slot& slot, const std::vector<int32_t>& prompt) const {
  const int64_t common = Whole(CommonPrefix(slot.cached, prompt));
  return options.deterministic ? std::min(common, slot.whole) : common;
}

// Gives a free slot to the next request, with the longest prefix that any slot has cached. False when there is no request or no
// room, or when it better waits for a prefix that is being computed.
bool Engine::Impl::AdmitNext() {
  if (waiting.empty() || !Relayout()) return false;
  const Request& request = waiting.front()->request();
  int64_t longest = 0, coming = 0;
  size_t source = slots.size(), target = slots.size();
  for (size_t i = 0; i < slots.size(); ++i) {
    const int64_t common = Shareable(slots[i], request.prompt);
    if (common > longest || source == slots.size()) {
      longest = common;
      source = i;
    }
    if (slots[i].sequence != nullptr) {
      const int64_t same = Whole(CommonPrefix(slots[i].sequence->request().prompt, request.prompt));
      coming = std::max(coming, same);
    } else if (target == slots.size() || slots[i].cached.size() < slots[target].cached.size()) {
      target = i;
    }
  }
  const int64_t most = Whole(request.prompt.size() - 1);  // the last token's logits are wanted
  longest = std::min(longest, most);
  if (target == slots.size() || std::min(coming, most) > longest + kWorthWaiting) return false;
  if (slots[source].sequence == nullptr && longest > 0) {
    target = source;
  } else if (longest > 0) {
    forward->CopyPrefix(static_cast<int64_t>(source), static_cast<int64_t>(target), longest);
  }
  Slot& slot = slots[target];
  slot.cached.assign(request.prompt.begin(), request.prompt.begin() + static_cast<std::ptrdiff_t>(longest));
  slot.whole = longest;
  slot.sequence = std::move(waiting.front());
  waiting.pop_front();
  statistics.reused_tokens += static_cast<uint64_t>(longest);
  return true;
}

void Engine::Impl::Admit() {
  do {
    // Nothing to generate: they need no room.
    while (!waiting.empty() && waiting.front()->limit() <= static_cast<int64_t>(waiting.front()->tokens().size())) {
      const std::unique_ptr<Sequence> sequence = std::move(waiting.front());
      waiting.pop_front();
      sequence->Finish("length");
    }
  } while (AdmitNext());
}

std::vector<StepBatch> Engine::Impl::NextSteps() const {
  std::vector<Work> work;
  for (size_t i = 0; i < slots.size(); ++i) {
    const Sequence* sequence = slots[i].sequence.get();
    if (sequence == nullptr) continue;
    work.push_back({.slot = static_cast<int64_t>(i),
                    .start = static_cast<int64_t>(slots[i].cached.size()),
                    .prompt = static_cast<int64_t>(sequence->request().prompt.size()),
                    .total = static_cast<int64_t>(sequence->tokens().size())});
  }
  std::vector<StepBatch> steps;
  for (PlannedStep& planned : options.deterministic ? PlanFixed(work, options.max_step_tokens, *forward)
                                                    : PlanMixed(work, options.max_step_tokens)) {
    StepBatch& step = steps.emplace_back();
    step.kind = planned.kind;
    step.runs = std::move(planned.runs);
    for (const Run& run : step.runs) {
      const std::vector<int32_t>& tokens = slots[static_cast<size_t>(run.slot)].sequence->tokens();
      step.token_ids.insert(step.token_ids.end(), tokens.begin() + run.start, tokens.begin() + run.start + run.count);
    }
  }
  return steps;
}

// Notes what the step cached; chooses and appends tokens where logits came.
void Engine::Impl::Advance(const StepBatch& step, const at::Tensor& logits) {
  std::vector<Slot*> chosen;
  for (const Run& run : step.runs) {
    Slot& slot = slots[static_cast<size_t>(run.slot)];
    const std::vector<int32_t>& tokens = slot.sequence->tokens();
    const int64_t prompt = static_cast<int64_t>(slot.sequence->request().prompt.size());
    if (run.start < prompt) statistics.prompt_tokens += static_cast<uint64_t>(run.count);
    slot.cached.insert(slot.cached.end(), tokens.begin() + run.start, tokens.begin() + run.start + run.count);
    if (run.start < prompt && run.count == kFixedPiece && run.start == slot.whole) slot.whole += run.count;
    if (run.wants_logits) chosen.push_back(&slot);
  }
  const int64_t vocab = logits.size(1);
  at::parallel_for(0, static_cast<int64_t>(chosen.size()), 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      chosen[static_cast<size_t>(i)]->sequence->Choose(logits.data_ptr<float>() + i * vocab, vocab);
    }
  });
  statistics.generated_tokens += chosen.size();
  for (Slot* slot : chosen) {
    if (slot->sequence->Append()) slot->sequence.reset();
  }
}

bool Engine::Step() {
  const c10::InferenceMode inference;
  Impl& impl = *impl_;
  impl.TakeSubmitted();
  impl.Admit();
  for (const StepBatch& step : impl.NextSteps()) impl.Advance(step, impl.forward->Step(step));
  const std::lock_guard lock(impl.mutex);
  return !impl.Idle() || !impl.waiting.empty() || !impl.submitted.empty();
}

EngineStatistics Engine::statistics() const { return impl_->statistics; }

StatusOr<std::vector<Completion>> Engine::Generate(const std::vector<Request>& requests, runtime::Reporter& reporter,
                                                   const std::function<void(size_t, const Completion&)>& on_done) {
  struct Submitted {  // taken back however this function ends
    Impl& impl;
    std::set<uint64_t> ids;
    ~Submitted() { impl.Drop(ids); }
  } submitted{*impl_, {}};
  std::vector<Completion> completions(requests.size());
  size_t done = 0, failed = requests.size();
  for (size_t i = 0; i < requests.size(); ++i) {
    StatusOr<uint64_t> id = Submit(requests[i], [&, i](const Completion& completion) {
      completions[i] = completion;
      ++done;
      if (!completion.error.ok()) failed = std::min(failed, i);
      if (on_done) on_done(i, completion);
    });
    if (!id.ok()) return Annotate(id.status(), Join("request ", i));
    submitted.ids.insert(*id);
  }
  const Clock::time_point start = Clock::now();
  Clock::time_point reported = start;
  const uint64_t before = impl_->statistics.generated_tokens;
  const auto report = [&] {
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    const uint64_t generated = impl_->statistics.generated_tokens - before;
    reporter.Report({.phase = "generating",
                     .done = static_cast<double>(done),
                     .total = static_cast<double>(requests.size()),
                     .tokens_per_second = static_cast<double>(generated) / std::max(seconds, 1e-9),
                     .tokens_generated = generated});
    reported = Clock::now();
  };
  while (done < requests.size()) {
    reporter.Check();
    Step();
    if (failed < requests.size()) {
      const Status error = Annotate(completions[failed].error, Join("request ", failed));
      if (absl::IsOutOfRange(error)) throw runtime::NumericException(Message(error));
      return error;
    }
    if (Clock::now() - reported >= kReportEvery) report();
  }
  report();
  return completions;
}

}  // namespace refinery::generate
