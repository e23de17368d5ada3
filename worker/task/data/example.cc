#include "worker/task/data/example.h"

#include <fstream>
#include <utility>

#include "common/files.h"
#include "worker/task/data/table.h"

namespace refinery::data {
namespace {

using nlohmann::json;

// CSV has text only: a list or a number stands there as its JSON text, and an empty cell is an absent field.
json Unquoted(const json& field) {
  if (!field.is_string()) return field;
  const std::string& text = field.get_ref<const std::string&>();
  if (text.empty()) return nullptr;
  json parsed = json::parse(text, nullptr, /*allow_exceptions=*/false);
  return parsed.is_discarded() ? field : parsed;
}

// Optional string field: absent and null mean "".
Status ReadString(const json& row, const char* field, bool required, const std::string& where, std::string* out) {
  const auto it = row.find(field);
  if (it == row.end() || it->is_null()) {
    if (!required) return absl::OkStatus();
    return InvalidArgument(where, ": field '", field, "' is missing; an example needs 'instruction' and 'output'");
  }
  if (!it->is_string()) return InvalidArgument(where, ": field '", field, "' must be a string, is ", it->type_name());
  *out = it->get<std::string>();
  return absl::OkStatus();
}

}  // namespace

json ToJson(const Example& example) {
  json row = {{"instruction", example.instruction}, {"input", example.input}, {"output", example.output}};
  if (!example.origin.empty()) row["origin"] = example.origin;
  if (!example.choices.empty()) row["choices"] = example.choices;
  if (example.answer_index >= 0) row["answer_index"] = example.answer_index;
  if (!example.extra.is_null()) row["extra"] = example.extra;
  return row;
}

StatusOr<Example> ExampleFromJson(const json& row, const std::string& where) {
  if (!row.is_object()) return InvalidArgument(where, ": expected a JSON object, found ", row.type_name());
  Example example;
  RF_RETURN_IF_ERROR(ReadString(row, "instruction", true, where, &example.instruction));
  RF_RETURN_IF_ERROR(ReadString(row, "input", false, where, &example.input));
  RF_RETURN_IF_ERROR(ReadString(row, "output", true, where, &example.output));
  RF_RETURN_IF_ERROR(ReadString(row, "origin", false, where, &example.origin));
  if (const json choices = Unquoted(row.value("choices", json())); !choices.is_null()) {
    if (!choices.is_array()) return InvalidArgument(where, ": field 'choices' must be a list of strings");
    for (const json& choice : choices) {
      if (!choice.is_string()) return InvalidArgument(where, ": field 'choices' must be a list of strings");
      example.choices.push_back(choice.get<std::string>());
    }
  }
  if (const json index = Unquoted(row.value("answer_index", json())); !index.is_null()) {
    if (!index.is_number_integer()) return InvalidArgument(where, ": field 'answer_index' must be an integer");
    example.answer_index = index.get<int64_t>();
    if (example.answer_index < -1 || example.answer_index >= static_cast<int64_t>(example.choices.size())) {
      return InvalidArgument(where, ": field 'answer_index' is ", example.answer_index, ", but there are ",
                             example.choices.size(), " choices");
    }
  }
  if (const auto it = row.find("extra"); it != row.end()) example.extra = *it;
  return example;
}

Status ForEachJsonLine(const std::filesystem::path& jsonl, size_t limit,
                       const std::function<Status(json row, const std::string& where)>& visit) {
  if (IsTable(jsonl)) {
    return ForEachTableRow(jsonl, {}, limit, [&](std::string_view text, size_t number) -> Status {
      const std::string where = Join(jsonl.string(), ": row ", number);
      json row = json::parse(text, nullptr, /*allow_exceptions=*/false);
      if (row.is_discarded()) return InvalidArgument(where, ": not valid JSON");
      return visit(std::move(row), where);
    });
  }
  std::ifstream file(jsonl);
  if (!file) return NotFound(jsonl.string(), ": cannot be opened");
  std::string line;
  size_t visited = 0;
  for (size_t number = 1; (limit == 0 || visited < limit) && std::getline(file, line); ++number) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const std::string where = Join(jsonl.string(), ":", number);
    json row = json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (row.is_discarded()) return InvalidArgument(where, ": not valid JSON");
    RF_RETURN_IF_ERROR(visit(std::move(row), where));
    ++visited;
  }
  if (file.bad()) return Unavailable(jsonl.string(), ": reading failed");
  return absl::OkStatus();
}

StatusOr<std::vector<json>> ReadJsonLines(const std::filesystem::path& jsonl, size_t limit) {
  std::vector<json> rows;
  RF_RETURN_IF_ERROR(ForEachJsonLine(jsonl, limit, [&](json row, const std::string&) {
    rows.push_back(std::move(row));
    return absl::OkStatus();
  }));
  return rows;
}

StatusOr<std::vector<Example>> ReadExamples(const std::filesystem::path& jsonl, size_t limit) {
  std::vector<Example> examples;
  RF_RETURN_IF_ERROR(ForEachJsonLine(jsonl, limit, [&](const json& row, const std::string& where) -> Status {
    RF_ASSIGN_OR_RETURN(Example example, ExampleFromJson(row, where));
    examples.push_back(std::move(example));
    return absl::OkStatus();
  }));
  return examples;
}

Status WriteExamples(const std::filesystem::path& jsonl, const std::vector<Example>& examples) {
  std::string text;
  for (const Example& example : examples) {
    // A model can end in the middle of a character: such bytes become U+FFFD instead of an exception.
    text += ToJson(example).dump(-1, ' ', false, json::error_handler_t::replace);
    text += '\n';
  }
  return WriteFileAtomically(jsonl, text);
}

}  // namespace refinery::data
