#include "worker/task/eval/requests.h"

#include "worker/task/data/text.h"

namespace refinery::eval {
namespace {

using tokenizer::ChatMessage;

// Both, with `delimiter` between them unless one of them has white space at the border.
std::string Delimited(const std::string& first, const std::string& second, const std::string& delimiter) {
  if (first.empty() || second.empty()) return first + second;
  const bool spaced = data::StripRight(first).size() != first.size() || data::StripLeft(second).size() != second.size();
  return first + (spaced ? "" : delimiter) + second;
}

std::vector<ChatMessage> Messages(const data::MultipleChoiceItem& item, const std::string& body, const std::string& system,
                                  bool multi_turn) {
  std::vector<ChatMessage> messages;
  if (!system.empty()) messages.push_back({"system", system});
  if (!multi_turn) {
    messages.push_back({"user", item.shots + body});
    return messages;
  }
  for (const data::Turn& turn : item.turns) {
    messages.push_back({"user", turn.question});
    messages.push_back({"assistant", turn.answer});
  }
  messages.push_back({"user", body});
  return messages;
}

}  // namespace

StatusOr<std::string> ContextOf(const data::MultipleChoiceItem& item, const std::string& body, const PromptOptions& options) {
  const std::string system = Delimited(options.system, item.description, "\n\n");
  if (options.chat_template == nullptr) return Join(system, item.shots, body);
  const auto rendered = options.chat_template->ApplyChatTemplate(Messages(item, body, system, options.multi_turn),
                                                                 /*add_generation_prompt=*/true);
  if (rendered.ok() || rendered.status().code() != absl::StatusCode::kInvalidArgument || system.empty()) return rendered;
  return options.chat_template->ApplyChatTemplate(Messages(item, body, "", options.multi_turn), /*add_generation_prompt=*/true);
}

StatusOr<std::vector<data::ScoreRequest>> RequestsOf(const data::MultipleChoiceItem& item, const PromptOptions& options) {
  std::vector<std::string> contexts;
  for (const std::string& body : item.bodies) {
    RF_ASSIGN_OR_RETURN(std::string context, ContextOf(item, body, options));
    contexts.push_back(std::move(context));
  }
  std::vector<data::ScoreRequest> requests;
  for (size_t choice = 0; choice < item.continuations.size(); ++choice) {
    const std::string& continuation = item.continuations[choice];
    requests.push_back({contexts.size() == 1 ? contexts.front() : contexts.at(choice),
                        options.chat_template == nullptr ? continuation : continuation.substr(item.delimiter.size())});
  }
  return requests;
}

}  // namespace refinery::eval
