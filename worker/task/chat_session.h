// worker/task/chat_session.h
//
// A conversation with a model, without a terminal: messages in, answers out piece by piece. The model's chat template makes the
// prompt; a model that has none continues the plain text of the conversation. What the last turn computed stays in the key-value
// cache.
//
// Threads: one.

#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/generate/engine.h"
#include "worker/task/model/causal_lm.h"
#include "worker/task/tokenizer/tokenizer.h"

namespace refinery::task {

struct ChatSettings {
  generate::SamplingSettings sampling;
  uint64_t seed = 0;             // of the first turn; each turn has its own
  int64_t max_new_tokens = 1024;
  int64_t context = 0;           // tokens of a conversation at most; 0 = what the model takes, up to 8192
  int64_t memory_budget = 0;     // bytes of the key-value cache; 0 = no bound
  std::string json_schema;       // text; every answer is a JSON value that fits it
};

struct Answer {
  std::string text;
  std::string finish_reason;     // as of the engine
  bool context_full = false;     // it ended because the context did
  int64_t prompt_tokens = 0;     // of the whole conversation
  int64_t computed_tokens = 0;   // of those, the ones that were not in the cache
  int64_t tokens = 0;            // of the answer
  double prompt_seconds = 0, answer_seconds = 0;
};

class ChatSession {
 public:
  ChatSession(std::shared_ptr<const model::CausalLm> lm, std::shared_ptr<const tokenizer::Tokenizer> tokenizer, ChatSettings settings);

  // Adds a message and returns the answer; `on_text` gets it piece by piece. `stop` is asked after every token: true ends the
  // answer there. INVALID_ARGUMENT when the template refuses the messages, RESOURCE_EXHAUSTED when the conversation does not
  // fit; then it is as before the call.
  StatusOr<Answer> Ask(const std::string& message, const std::function<void(const std::string&)>& on_text,
                       const std::function<bool()>& stop);
  // Forgets everything but the system prompt.
  void Clear();
  // Empty = none. Takes effect from the next message on, for the whole conversation.
  void SetSystem(const std::string& text) { system_ = text; }
  const std::string& system() const { return system_; }
  // With the system prompt first, where there is one.
  std::vector<tokenizer::ChatMessage> Messages() const;
  bool has_template() const { return has_template_; }
  int64_t context() const { return settings_.context; }

 private:
  StatusOr<std::vector<int32_t>> Prompt() const;

  const std::shared_ptr<const tokenizer::Tokenizer> tokenizer_;
  ChatSettings settings_;
  generate::Engine engine_;
  bool has_template_ = true;
  std::string system_;
  std::vector<tokenizer::ChatMessage> messages_;
  uint64_t turns_ = 0;
};

}  // namespace refinery::task
