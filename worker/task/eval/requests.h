// worker/task/eval/requests.h
//
// From an item to the strings that are scored: plain text, or messages through the model's chat template, as
// lm-evaluation-harness 0.4.13 builds them (Task.fewshot_context, construct_requests).
//
// With a chat template the description (after the system instruction, a blank line between them) is the system message, each
// shot a user and an assistant message (or, with multi_turn off, all of them one user message), and nothing stands between the
// rendered prompt and the choice. A template that refuses a system message is rendered again without it.
//
// Threads: pure functions.

#pragma once

#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/data/benchmark.h"
#include "worker/task/data/scoring.h"
#include "worker/task/tokenizer/tokenizer.h"

namespace refinery::eval {

struct PromptOptions {
  std::string system;                                     // an instruction before everything else; usually empty
  const tokenizer::Tokenizer* chat_template = nullptr;    // whose template is used; null = plain text
  bool multi_turn = true;
};

// One request per choice. FAILED_PRECONDITION when the model has no chat template.
StatusOr<std::vector<data::ScoreRequest>> RequestsOf(const data::MultipleChoiceItem& item, const PromptOptions& options);
// The prompt before one body.
StatusOr<std::string> ContextOf(const data::MultipleChoiceItem& item, const std::string& body, const PromptOptions& options);

}  // namespace refinery::eval
