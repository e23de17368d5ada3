#include "worker/task/data/structured.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "worker/task/data/text.h"

namespace refinery::data {
namespace {

using nlohmann::ordered_json;

constexpr int kMaxQuestionCharacters = 600, kMaxOptionCharacters = 100;

// "<question>\nA. <option>\nB. <option>" as an object; a text without enough lines keeps them all in the question.
ordered_json ObjectOf(const TaskFormat& format, const std::string& question) {
  std::vector<std::string> lines = Split(question, "\n");
  if (format.letters == 0 || lines.size() <= format.letters) return {{"question", question}};
  std::vector<std::string> options(lines.end() - static_cast<std::ptrdiff_t>(format.letters), lines.end());
  for (std::string& option : options) option.erase(0, std::min<size_t>(3, option.size()));  // "A. "
  std::string text;
  for (size_t i = 0; i + format.letters < lines.size(); ++i) text += (i == 0 ? "" : " ") + lines[i];
  return {{"question", text}, {"options", options}};
}

std::string Line(const ordered_json& object) {
  return object.dump(-1, ' ', /*ensure_ascii=*/false, ordered_json::error_handler_t::replace);
}

}  // namespace

std::string StructuredPrompt(const TaskFormat& format, const std::vector<Example>& seeds, const std::vector<std::string>& seed_topics,
                             const QuestionPlan& plan) {
  std::string prompt = format.description.empty() ? "" : Join(format.description, "\n\n");
  prompt += Join("The following are ", format.kind, ", each as a JSON object. Each is about the topic above it.\n\n");
  for (const size_t shot : plan.shots) {
    prompt += Join("Topic: ", seed_topics[shot], "\n", Line(ObjectOf(format, QuestionOf(format, seeds[shot].instruction))), "\n\n");
  }
  return prompt + Join("Topic: ", plan.topic, "\n");
}

std::string QuestionSchema(const TaskFormat& format) {
  const auto text = [](int longest) { return ordered_json{{"type", "string"}, {"minLength", 1}, {"maxLength", longest}}; };
  ordered_json schema = {{"type", "object"},
                         {"properties", {{"question", text(kMaxQuestionCharacters)}}},
                         {"required", {"question"}},
                         {"additionalProperties", false},
                         {"x-guidance", {{"whitespace_flexible", false}}}};
  if (format.letters > 0) {
    schema["properties"]["options"] = {{"type", "array"},
                                       {"items", text(kMaxOptionCharacters)},
                                       {"minItems", format.letters},
                                       {"maxItems", format.letters}};
    schema["required"].push_back("options");
  }
  return schema.dump();
}

Parsed ParseStructuredQuestion(const TaskFormat& format, std::string_view generated, std::string_view finish_reason) {
  if (finish_reason == "length") return {std::string(generated), "truncated", "no end within the token limit"};
  const ordered_json object = ordered_json::parse(generated, nullptr, /*allow_exceptions=*/false);
  const auto is_text = [](const ordered_json& value) { return value.is_string(); };
  if (!object.is_object() || !object.contains("question") || !is_text(object["question"]))
    return {std::string(generated), "bad_json", "no object with a question"};
  std::string text(Strip(object["question"].get<std::string>()));
  if (format.letters > 0) {
    const ordered_json options = object.value("options", ordered_json::array());
    if (!options.is_array() || options.size() != format.letters || !std::ranges::all_of(options, is_text))
      return {std::string(generated), "bad_json", "not as many options as letters"};
    text = ReplaceAll(text, "\n", " ");
    for (size_t i = 0; i < format.letters; ++i) {
      const std::string option = ReplaceAll(options[i].get<std::string>(), "\n", " ");
      text += Join("\n", std::string(1, static_cast<char>('A' + i)), ". ", Strip(option));
    }
  }
  return ParseQuestion(format, text, "stop");
}

std::string AnswerRegex(const TaskFormat& format) {
  if (format.letters == 0) return "";
  return Join(" [A-", std::string(1, static_cast<char>('A' + format.letters - 1)), "]");
}

}  // namespace refinery::data
