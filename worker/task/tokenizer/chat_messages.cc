#include "worker/task/tokenizer/chat_messages.h"

#include <string_view>

namespace refinery::tokenizer {
namespace {

using nlohmann::ordered_json;

constexpr std::string_view kTag = "CONTINUE_FINAL_MESSAGE_TAG";

// The text that the last message's content ends with: the content itself, or the last text among its parts.
const ordered_json* FinalText(const ordered_json& message) {
  auto content = message.find("content");
  if (content == message.end()) return nullptr;
  if (content->is_string()) return &*content;
  if (!content->is_array()) return nullptr;
  for (auto part = content->rbegin(); part != content->rend(); ++part)
    if (part->is_object() && part->contains("text") && part->at("text").is_string()) return &part->at("text");
  return nullptr;
}

// White space as Python's str.strip() takes it away.
constexpr std::string_view kSpaces[] = {
    " ", "\t", "\n", "\v", "\f", "\r", "\x1c", "\x1d", "\x1e", "\x1f", "\u0085", "\u00a0", "\u1680", "\u2000", "\u2001",
    "\u2002", "\u2003", "\u2004", "\u2005", "\u2006", "\u2007", "\u2008", "\u2009", "\u200a", "\u2028", "\u2029", "\u202f",
    "\u205f", "\u3000"};

std::string_view StripRight(std::string_view text) {
  for (bool found = true; found;) {
    found = false;
    for (std::string_view space : kSpaces)
      while (text.ends_with(space)) {
        text.remove_suffix(space.size());
        found = true;
      }
  }
  return text;
}

std::string_view Strip(std::string_view text) {
  for (bool found = true; found;) {
    found = false;
    for (std::string_view space : kSpaces)
      while (text.starts_with(space)) {
        text.remove_prefix(space.size());
        found = true;
      }
  }
  return StripRight(text);
}

// {"thinking": reasoning, all that the message holds, "reasoning_content": reasoning}.
ordered_json WithReasoning(const ordered_json& message) {
  const ordered_json* reasoning = nullptr;
  for (const char* name : {"reasoning_content", "thinking", "reasoning"}) {
    auto found = message.find(name);
    if (reasoning == nullptr && found != message.end() && !found->is_null()) reasoning = &*found;
  }
  if (reasoning == nullptr) return message;
  ordered_json result = ordered_json::object();
  result["thinking"] = *reasoning;
  for (const auto& [name, value] : message.items()) result[name] = value;
  result["reasoning_content"] = *reasoning;
  return result;
}

}  // namespace

StatusOr<ordered_json> TemplateMessages(const ordered_json& messages, bool continue_final) {
  if (!messages.is_array()) return InvalidArgument("chat messages are not a list");
  ordered_json result = ordered_json::array();
  for (size_t i = 0; i < messages.size(); ++i) {
    if (!messages[i].is_object()) return InvalidArgument("chat message ", i, " is not an object");
    result.push_back(WithReasoning(messages[i]));
  }
  if (!continue_final) return result;
  if (result.empty()) return InvalidArgument("there is no final chat message to continue");
  auto* text = const_cast<ordered_json*>(FinalText(result.back()));
  if (text == nullptr) return InvalidArgument("the final chat message has no text to continue");
  *text = text->get<std::string>() + std::string(kTag) + " ";
  return result;
}

StatusOr<std::string> CutAtFinalMessage(std::string rendered, const ordered_json& messages) {
  const ordered_json* text = FinalText(messages.back());
  size_t tag = rendered.rfind(kTag);
  if (text == nullptr || tag == std::string::npos ||
      rendered.find(Strip(text->get_ref<const std::string&>())) == std::string::npos)
    return InvalidArgument("the chat template does not show the final message as it is, so it cannot be continued");
  // A template that keeps the blank after the tag trims nothing; otherwise trailing white space went with the tag.
  const bool keeps = tag + kTag.size() < rendered.size() && rendered[tag + kTag.size()] == ' ';
  rendered.resize(tag);
  if (!keeps) rendered.resize(StripRight(rendered).size());
  return rendered;
}

}  // namespace refinery::tokenizer
