#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include "worker/task/chat_session.h"

#include <algorithm>
#include <chrono>
#include <ctime>

namespace refinery::task {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kUsualContext = 8192;

double SecondsBetween(Clock::time_point from, Clock::time_point to) { return std::chrono::duration<double>(to - from).count(); }

ChatSettings WithContext(ChatSettings settings, const model::CausalLm& lm) {
  const int64_t most = lm.config().max_position;
  settings.context = settings.context > 0 ? std::min(settings.context, most) : std::min(most, kUsualContext);
  return settings;
}

}  // namespace

ChatSession::ChatSession(std::shared_ptr<const model::CausalLm> lm, std::shared_ptr<const tokenizer::Tokenizer> tokenizer,
                         ChatSettings settings)
    : tokenizer_(tokenizer),
      settings_(WithContext(std::move(settings), *lm)),
      engine_(lm, {.max_batch = 1,
                   .memory_budget = settings_.memory_budget,
                   .min_capacity = settings_.context,  // so that a growing conversation keeps its cache
                   .tokenizer = std::move(tokenizer)}) {
  has_template_ = !absl::IsFailedPrecondition(tokenizer_->ApplyChatTemplate({{"user", "?"}}, true).status());
}

std::vector<tokenizer::ChatMessage> ChatSession::Messages() const {
  std::vector<tokenizer::ChatMessage> all;
  if (!system_.empty()) all.push_back({"system", system_});
  all.insert(all.end(), messages_.begin(), messages_.end());
  return all;
}

void ChatSession::Clear() { messages_.clear(); }

StatusOr<std::vector<int32_t>> ChatSession::Prompt() const {
  if (has_template_) {
    tokenizer::ChatOptions options{.now_seconds = static_cast<int64_t>(std::time(nullptr))};
    RF_ASSIGN_OR_RETURN(const std::string text, tokenizer_->ApplyChatTemplate(Messages(), true, options));
    return tokenizer_->Encode(text, /*add_special_tokens=*/false);
  }
  std::string text;
  for (const tokenizer::ChatMessage& message : Messages()) text += message.content;
  return tokenizer_->Encode(text);
}

StatusOr<Answer> ChatSession::Ask(const std::string& message, const std::function<void(const std::string&)>& on_text,
                                  const std::function<bool()>& stop) {
  messages_.push_back({"user", message});
  struct Undo {  // unless there is an answer
    std::vector<tokenizer::ChatMessage>* messages;
    ~Undo() {
      if (messages != nullptr) messages->pop_back();
    }
  } undo{&messages_};
  RF_ASSIGN_OR_RETURN(std::vector<int32_t> prompt, Prompt());
  Answer answer{.prompt_tokens = static_cast<int64_t>(prompt.size())};
  const int64_t room = settings_.context - answer.prompt_tokens;
  if (room < 1)
    return ResourceExhausted("the conversation has ", answer.prompt_tokens, " tokens and the context holds ", settings_.context,
                             ": begin a new one (/clear), or see --context");
  generate::Request request{.prompt = std::move(prompt),
                            .max_new_tokens = std::min(settings_.max_new_tokens, room),
                            .sampling = settings_.sampling,
                            .seed = settings_.seed + turns_++,
                            .end_ids = tokenizer_->end_ids()};
  if (!settings_.json_schema.empty()) request.constraint = {generate::Constraint::Kind::kJsonSchema, settings_.json_schema};
  const Clock::time_point start = Clock::now();
  Clock::time_point first = start;
  request.on_piece = [&](const generate::Piece& piece) {
    if (first == start) first = Clock::now();
    if (!piece.text.empty()) on_text(piece.text);
  };
  generate::Completion completion;
  const uint64_t computed = engine_.statistics().prompt_tokens;
  RF_ASSIGN_OR_RETURN(const uint64_t id, engine_.Submit(std::move(request), [&](const generate::Completion& c) { completion = c; }));
  while (engine_.Step()) {
    if (stop()) engine_.Cancel(id);
  }
  RF_RETURN_IF_ERROR(completion.error);
  answer.text = completion.text;
  answer.finish_reason = completion.finish_reason;
  answer.tokens = static_cast<int64_t>(completion.tokens.size());
  answer.computed_tokens = static_cast<int64_t>(engine_.statistics().prompt_tokens - computed);
  answer.context_full = answer.finish_reason == "length" && answer.tokens == room;
  answer.prompt_seconds = SecondsBetween(start, first);
  answer.answer_seconds = SecondsBetween(first, Clock::now());
  if (answer.text.empty() && answer.finish_reason == "cancelled") return answer;
  undo.messages = nullptr;
  messages_.push_back({"assistant", answer.text});
  return answer;
}

}  // namespace refinery::task
