// worker/task/tokenizer/tokenizer.h
//
// Hugging Face tokenizers and chat templates through the Rust bridge (worker/task/rust: crates `tokenizers`,
// `minijinja`). Templates render as with transformers' apply_chat_template; a rendering is bounded: 4 million
// instructions, texts of 16 MiB, 20 seconds.
// Errors: one sentence naming the file and, where it is known, the field or line.
// Threads: const methods are thread-safe.

#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"

struct RbTokenizer;

namespace refinery::tokenizer {

struct ChatMessage {
  std::string role;     // "system", "user", "assistant"
  std::string content;
};

struct ChatOptions {
  // What strftime_now tells a template, in seconds since 1970 (UTC). Fixed, not the clock, so that the same messages
  // give the same tokens on every day; 26 July 2024 is the date that Llama 3's own template falls back to.
  int64_t now_seconds = 1'721'952'000;
  // Further variables of the template, e.g. {"enable_thinking", false}; they replace those of the same name.
  std::map<std::string, nlohmann::ordered_json> variables;
  // Functions that the model may call, as JSON schemas, and documents to answer from; null: none.
  nlohmann::ordered_json tools = nullptr;
  nlohmann::ordered_json documents = nullptr;
  // Leaves the last message open, for the model to go on with; not together with a generation prompt.
  bool continue_final_message = false;
};

class Tokenizer {
 public:
  // Reads tokenizer.json, tokenizer_config.json and (for end-of-text ids) config.json / generation_config.json.
  static StatusOr<std::shared_ptr<const Tokenizer>> Load(const std::filesystem::path& model_folder);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // Ids of `text`. With add_special_tokens the tokenizer's own post-processor runs (Llama-3 adds BOS, SmolLM2 does
  // not).
  StatusOr<std::vector<int32_t>> Encode(std::string_view text, bool add_special_tokens = true) const;
  StatusOr<std::string> Decode(const std::vector<int32_t>& ids, bool skip_special_tokens = true) const;
  // The chat template over `messages`. FAILED_PRECONDITION when the model has none.
  // INVALID_ARGUMENT with the template's own words when it refuses the messages (raise_exception).
  StatusOr<std::string> ApplyChatTemplate(const std::vector<ChatMessage>& messages, bool add_generation_prompt) const;
  StatusOr<std::string> ApplyChatTemplate(const std::vector<ChatMessage>& messages, bool add_generation_prompt,
                                          const ChatOptions& options) const;
  // The same for messages with more than a role and a text: a list of objects with the fields that the template knows
  // (tool_calls, tool_call_id, name, reasoning_content, content in parts). Fields keep their order.
  StatusOr<std::string> RenderChat(const nlohmann::ordered_json& messages, bool add_generation_prompt,
                                   const ChatOptions& options) const;

  const std::string& folder() const;  // what Load was given
  int64_t vocab_size() const;
  std::optional<int32_t> bos_id() const;
  // Every id that ends a generation (eos_token and generation_config's list).
  const std::vector<int32_t>& end_ids() const;
  std::optional<int32_t> IdOf(std::string_view token) const;

 private:
  friend class ConstraintFactory;
  struct Impl;
  const RbTokenizer* bridge() const;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace refinery::tokenizer
