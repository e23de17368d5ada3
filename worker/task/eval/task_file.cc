#include "worker/task/eval/task_file.h"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <charconv>
#include <functional>
#include <map>
#include <set>

#include "common/files.h"
#include "worker/task/data/text.h"
#include "worker/task/tokenizer/text_template.h"

namespace refinery::eval {
namespace {

using nlohmann::json;
using tokenizer::TextTemplate;
using Kind = TaskItems::Kind;

const std::vector<std::string>& KeysOf(Kind kind) {
  static const auto& keys = *new std::map<Kind, std::vector<std::string>>{
      {Kind::kMultipleChoice,
       {"task", "type", "data", "pool", "shots", "description", "context", "choices", "answer", "delimiter", "metrics"}},
      {Kind::kExactMatch,
       {"task", "type", "data", "pool", "shots", "description", "context", "answer", "delimiter", "stop", "max_new_tokens", "strip",
        "ignore_case", "ignore_punctuation", "ignore_numbers"}},
      {Kind::kAnswer, {"task", "type", "data", "pool", "shots", "description", "context", "answer", "delimiter"}},
      {Kind::kText, {"task", "type", "data", "text", "detokenize"}}};
  return keys.at(kind);
}

std::string Listed(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += Join(text.empty() ? "" : ", ", word);
  return text;
}

// The keys of one file. The first error stays; later reads return what they were given to fall back to.
class File {
 public:
  File(std::string name, const YAML::Node& root) : name_(std::move(name)), root_(root) {
    if (!root_.IsMap()) Fail(root_, "a task file is a mapping; it begins with the keys task, type and data");
  }

  Kind ReadKind() {
    const std::string type = Text("type", "", /*required=*/true);
    Kind kind = Kind::kMultipleChoice;
    if (type == "multiple_choice") kind = Kind::kMultipleChoice;
    else if (type == "exact_match") kind = Kind::kExactMatch;
    else if (type == "perplexity") kind = Has("context") ? Kind::kAnswer : Kind::kText;
    else FailAt("type", Join("'", type, "' is no type of task; it is multiple_choice, exact_match or perplexity"));
    if (!status_.ok()) return kind;
    std::set<std::string> seen;
    for (const auto& entry : root_) {
      const std::string key = entry.first.IsScalar() ? entry.first.Scalar() : "";
      const std::vector<std::string>& known = KeysOf(kind);
      if (std::find(known.begin(), known.end(), key) == known.end()) {
        Fail(entry.first, Join("unknown key '", key, "'; a task of this type may have ", Listed(known)));
      } else if (!seen.insert(key).second) {
        Fail(entry.first, Join("key '", key, "' stands twice"));
      }
    }
    return kind;
  }

  bool Has(const char* key) const { return root_.IsMap() && root_[key].IsDefined(); }

  std::string Text(const char* key, const std::string& otherwise, bool required = false) {
    if (!Present(key, required)) return otherwise;
    const YAML::Node node = root_[key];
    if (node.IsScalar()) return node.Scalar();
    FailAt(key, "must be a text");
    return otherwise;
  }

  std::vector<std::string> Texts(const char* key, std::vector<std::string> otherwise) {
    if (!Present(key, false)) return otherwise;
    std::vector<std::string> texts;
    if (!root_[key].IsSequence()) FailAt(key, "must be a list of texts");
    else for (const YAML::Node& node : root_[key]) texts.push_back(node.IsScalar() ? node.Scalar() : "");
    return texts;
  }

  bool Flag(const char* key, bool otherwise) {
    const std::string text = Text(key, otherwise ? "true" : "false");
    if (text == "true" || text == "false") return text == "true";
    FailAt(key, Join("must be true or false, is '", text, "'"));
    return otherwise;
  }

  int64_t Number(const char* key, int64_t otherwise, int64_t least, int64_t most) {
    const std::string text = Text(key, std::to_string(otherwise));
    int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error == std::errc() && end == text.data() + text.size() && value >= least && value <= most) return value;
    FailAt(key, Join("must be a whole number from ", least, " to ", most, ", is '", text, "'"));
    return otherwise;
  }

  std::shared_ptr<const TextTemplate> Template(const char* key, const std::string& source) {
    if (!status_.ok()) return nullptr;
    const auto compiled = TextTemplate::Compile(source);
    if (compiled.ok()) return *compiled;
    FailAt(key, Join("is no template: ", Message(compiled.status())));
    return nullptr;
  }
  std::shared_ptr<const TextTemplate> Template(const char* key) { return Template(key, Text(key, "", /*required=*/true)); }

  bool IsList(const char* key) const { return Has(key) && root_[key].IsSequence(); }
  void FailAt(const char* key, const std::string& what) {
    Fail(Has(key) ? root_[key] : root_, Join("'", key, "' ", what));
  }
  const Status& status() const { return status_; }

 private:
  bool Present(const char* key, bool required) {
    if (!status_.ok()) return false;
    if (Has(key)) return true;
    if (required) Fail(root_, Join("the key '", key, "' is missing"));
    return false;
  }

  void Fail(const YAML::Node& node, const std::string& what) {
    if (status_.ok()) status_ = InvalidArgument(name_, ":", node.Mark().line + 1, ": ", what);
  }

  std::string name_;
  YAML::Node root_;
  Status status_;
};

// What the templates of a task make of a row.
class RowTemplates {
 public:
  RowTemplates(File& file, Kind kind) : kind_(kind), delimiter_(file.Text("delimiter", " ")) {
    if (file.Has("description")) description_ = file.Template("description");
    context_ = file.Template("context");
    answer_ = file.Template("answer");
    if (kind != Kind::kMultipleChoice) return;
    if (file.IsList("choices")) {
      for (const std::string& source : file.Texts("choices", {})) choices_.push_back(file.Template("choices", source));
      if (choices_.size() < 2) file.FailAt("choices", "must hold two or more");
      return;
    }
    // "{{ options }}", or "options": an expression whose value is a list.
    std::string expression(data::Strip(file.Text("choices", "", /*required=*/true)));
    if (expression.starts_with("{{") && expression.ends_with("}}")) expression = expression.substr(2, expression.size() - 4);
    choice_list_ = file.Template("choices", Join("{{ (", expression, ") | tojson }}"));
  }

  StatusOr<data::MultipleChoiceItem> ItemOf(const std::string& task, const json& row, const std::string& where) const {
    data::MultipleChoiceItem item;
    item.task = task;
    item.delimiter = delimiter_;
    item.row = row.dump(-1, ' ', false, json::error_handler_t::replace);
    if (description_ != nullptr) {
      RF_ASSIGN_OR_RETURN(item.description, Rendered(*description_, "description", row, where));
    }
    RF_ASSIGN_OR_RETURN(item.question, Rendered(*context_, "context", row, where));
    item.bodies = {item.question};
    RF_ASSIGN_OR_RETURN(const std::string answer, Rendered(*answer_, "answer", row, where));
    if (kind_ == Kind::kMultipleChoice) {
      RF_ASSIGN_OR_RETURN(item.choices, ChoicesOf(row, where));
      RF_ASSIGN_OR_RETURN(item.gold, GoldOf(answer, item.choices, where));
    } else {
      item.choices = {answer};
      item.gold = 0;
    }
    item.answers = item.choices;
    for (const std::string& choice : item.choices) {
      if (choice.empty()) return InvalidArgument(where, ": an answer is empty; there is nothing to score");
      item.continuations.push_back(delimiter_ + choice);
    }
    return item;
  }

 private:
  static StatusOr<std::string> Rendered(const TextTemplate& source, const char* key, const json& row, const std::string& where) {
    auto text = source.Render(row);
    if (text.ok()) return text;
    return InvalidArgument(where, ": the template of '", key, "' fails: ", Message(text.status()));
  }

  StatusOr<std::vector<std::string>> ChoicesOf(const json& row, const std::string& where) const {
    std::vector<std::string> choices;
    for (const auto& choice : choices_) {
      RF_ASSIGN_OR_RETURN(std::string text, Rendered(*choice, "choices", row, where));
      choices.push_back(std::move(text));
    }
    if (choice_list_ == nullptr) return choices;
    RF_ASSIGN_OR_RETURN(const std::string text, Rendered(*choice_list_, "choices", row, where));
    const json list = json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (!list.is_array() || list.size() < 2) {
      return InvalidArgument(where, ": 'choices' must give a list of two or more, gives ", text.substr(0, 80));
    }
    for (const json& choice : list) choices.push_back(choice.is_string() ? choice.get<std::string>() : choice.dump());
    return choices;
  }

  // Digits are an index; anything else is one of the choices.
  static StatusOr<int64_t> GoldOf(const std::string& answer, const std::vector<std::string>& choices, const std::string& where) {
    size_t index = 0;
    const auto [end, error] = std::from_chars(answer.data(), answer.data() + answer.size(), index);
    if (error == std::errc() && end == answer.data() + answer.size() && index < choices.size()) {
      return static_cast<int64_t>(index);
    }
    const auto found = std::find(choices.begin(), choices.end(), answer);
    if (found != choices.end()) return found - choices.begin();
    return InvalidArgument(where, ": 'answer' gives '", answer.substr(0, 80), "', which is neither a number from 0 to ",
                           choices.size() - 1, " nor one of the choices");
  }

  Kind kind_;
  std::string delimiter_;
  std::shared_ptr<const TextTemplate> description_, context_, answer_, choice_list_;
  std::vector<std::shared_ptr<const TextTemplate>> choices_;
};

std::filesystem::path Beside(const std::string& file, const std::string& path) {
  return std::filesystem::path(file).parent_path() / path;
}

ExactMatchRules ReadRules(File& file) {
  return {.stop = file.Texts("stop", {"\n"}),
          .max_new_tokens = file.Number("max_new_tokens", 32, 1, 100'000),
          .strip = file.Flag("strip", true),
          .ignore_case = file.Flag("ignore_case", false),
          .ignore_punctuation = file.Flag("ignore_punctuation", false),
          .ignore_numbers = file.Flag("ignore_numbers", false)};
}

Status ReadPages(const std::filesystem::path& path, const TextTemplate& text, size_t limit, TaskItems* task) {
  return data::ForEachJsonLine(path, limit, [&](const json& row, const std::string& where) -> Status {
    auto page = text.Render(row);
    if (!page.ok()) return InvalidArgument(where, ": the template of 'text' fails: ", Message(page.status()));
    task->pages.push_back(*std::move(page));
    return absl::OkStatus();
  });
}

Status ReadRows(const std::filesystem::path& path, const RowTemplates& templates, size_t limit, const std::string& task,
                std::vector<data::MultipleChoiceItem>* items) {
  return data::ForEachJsonLine(path, limit, [&](const json& row, const std::string& where) -> Status {
    RF_ASSIGN_OR_RETURN(data::MultipleChoiceItem item, templates.ItemOf(task, row, where));
    items->push_back(std::move(item));
    return absl::OkStatus();
  });
}

Status ReadItemsAndShots(const std::string& name, File& file, const TaskSource& source, TaskItems* task) {
  const std::filesystem::path path = Beside(name, file.Text("data", "", /*required=*/true));
  const std::filesystem::path pool_path = Beside(name, file.Text("pool", file.Text("data", "")));
  const size_t shots = source.shots.value_or(static_cast<size_t>(file.Number("shots", 0, 0, 100)));
  const std::vector<std::string> metrics = file.Texts("metrics", {"acc", "acc_norm"});
  for (const std::string& metric : metrics) {
    if (metric != "acc" && metric != "acc_norm") file.FailAt("metrics", Join("knows acc and acc_norm, not '", metric, "'"));
  }
  task->acc_norm = std::find(metrics.begin(), metrics.end(), "acc_norm") != metrics.end();
  if (task->kind == Kind::kExactMatch) task->exact_match = ReadRules(file);
  const RowTemplates templates(file, task->kind);
  RF_RETURN_IF_ERROR(file.status());
  RF_RETURN_IF_ERROR(ReadRows(path, templates, source.limit, task->name, &task->items));
  if (task->items.empty()) return InvalidArgument(path.string(), " holds no rows");
  if (shots == 0) return absl::OkStatus();
  std::vector<data::MultipleChoiceItem> pool;
  RF_RETURN_IF_ERROR(ReadRows(pool_path, templates, 0, task->name, &pool));
  // Where the shots come from the scored rows themselves, a row is never its own example.
  RF_ASSIGN_OR_RETURN(task->items, data::WithDrawnShots(task->items, pool, shots, /*exclude=*/pool_path == path));
  return absl::OkStatus();
}

}  // namespace

StatusOr<TaskItems> LoadTaskFile(const std::string& file_name, const TaskSource& source) {
  RF_ASSIGN_OR_RETURN(const std::string text, ReadFile(file_name, 1 << 20));
  YAML::Node root;
  try {
    root = YAML::Load(text);
  } catch (const YAML::Exception& error) {
    return InvalidArgument(file_name, ":", error.mark.line + 1, ": not YAML: ", error.msg);
  }
  File file(file_name, root);
  TaskItems task{.kind = file.ReadKind()};
  task.name = file.Text("task", std::filesystem::path(file_name).stem().string());
  const bool plain = !task.name.empty() && task.name.find_first_of("/\\ ") == std::string::npos && !task.name.starts_with(".");
  if (!plain) file.FailAt("task", "must be a name without spaces and slashes");
  RF_RETURN_IF_ERROR(file.status());
  if (task.kind == Kind::kText) {
    task.detokenize = file.Flag("detokenize", false);
    const std::filesystem::path path = Beside(file_name, file.Text("data", "", /*required=*/true));
    const std::shared_ptr<const TextTemplate> page = file.Template("text");
    RF_RETURN_IF_ERROR(file.status());
    RF_RETURN_IF_ERROR(ReadPages(path, *page, source.limit, &task));
    if (task.pages.empty()) return InvalidArgument(path.string(), " holds no rows");
    return task;
  }
  RF_RETURN_IF_ERROR(ReadItemsAndShots(file_name, file, source, &task));
  return task;
}

}  // namespace refinery::eval
