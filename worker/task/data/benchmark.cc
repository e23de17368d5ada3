#include "worker/task/data/benchmark.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

#include "worker/task/data/random.h"
#include "worker/task/data/text.h"

namespace refinery::data {
namespace {

using nlohmann::json;

const std::vector<std::string>& Tasks() {
  static const auto& tasks = *new std::vector<std::string>{"arc_easy",   "commonsense_qa", "hellaswag",   "mmlu",
                                                           "openbookqa", "piqa",           "social_i_qa", "winogrande"};
  return tasks;
}

// Fields of one row. The first error stays; later reads return empty values.
class Row {
 public:
  Row(const json& row, std::string where) : row_(row), where_(std::move(where)) {
    if (!row.is_object()) Fail("expected a JSON object");
  }

  std::string String(const char* field) { return AsString(Find(row_, field), field); }

  std::vector<std::string> Strings(const json& parent, const char* field) {
    std::vector<std::string> values;
    const json list = Structure(parent, field);
    if (list.is_null()) return values;
    if (!list.is_array()) {
      Fail(Join("field '", field, "' must be a list of strings"));
      return values;
    }
    for (const json& value : list) values.push_back(AsString(&value, field));
    return values;
  }
  std::vector<std::string> Strings(const char* field) { return Strings(row_, field); }

  // An integer, or a string that spells one (Hugging Face stores labels both ways), minus `base`.
  int64_t Label(const char* field, int64_t base, size_t count) {
    const json* value = Find(row_, field);
    if (value == nullptr) return -1;
    int64_t label = base - 1;
    if (value->is_number_integer()) {
      label = value->get<int64_t>();
    } else if (value->is_string() && value->get_ref<const std::string&>().size() == 1) {
      label = value->get_ref<const std::string&>()[0] - '0';
    }
    if (label < base || label >= base + static_cast<int64_t>(count)) {
      Fail(Join("field '", field, "' is ", value->dump(-1, ' ', false, json::error_handler_t::replace),
                "; expected a number from ", base, " to ", base + static_cast<int64_t>(count) - 1,
                " (splits without answers cannot be scored)"));
      return -1;
    }
    return label - base;
  }

  // choices {text[], label[]} and answerKey.
  std::pair<std::vector<std::string>, int64_t> LabelledChoices() {
    const json choices = Structure(row_, "choices");
    if (choices.is_null()) return {};
    if (!choices.is_object()) {
      Fail("field 'choices' must be an object with 'text' and 'label'");
      return {};
    }
    std::vector<std::string> texts = Strings(choices, "text");
    const std::vector<std::string> labels = Strings(choices, "label");
    const std::string key(StripLeft(String("answerKey")));
    if (!status_.ok()) return {};
    const auto it = std::find(labels.begin(), labels.end(), key);
    if (it == labels.end()) Fail(Join("field 'answerKey' is '", key, "', which is not in choices.label"));
    if (texts.size() != labels.size()) Fail("choices.text and choices.label differ in length");
    return {std::move(texts), it - labels.begin()};
  }

  void ExpectCount(const std::vector<std::string>& values, size_t count, const char* field) {
    if (values.size() != count) Fail(Join("field '", field, "' holds ", values.size(), " choices, expected ", count));
  }

  void Fail(const std::string& what) {
    if (status_.ok()) status_ = InvalidArgument(where_, ": ", what);
  }
  const Status& status() const { return status_; }

 private:
  const json* Find(const json& parent, const char* field) {
    if (!status_.ok()) return nullptr;
    const auto it = parent.find(field);
    if (it != parent.end() && !it->is_null()) return &*it;
    Fail(Join("field '", field, "' is missing"));
    return nullptr;
  }

  // A list or an object; CSV, which has text only, holds its JSON text. Null after an error.
  json Structure(const json& parent, const char* field) {
    const json* value = Find(parent, field);
    if (value == nullptr) return nullptr;
    if (!value->is_string()) return *value;
    json parsed = json::parse(value->get_ref<const std::string&>(), nullptr, /*allow_exceptions=*/false);
    return parsed.is_structured() ? parsed : *value;
  }

  std::string AsString(const json* value, const char* field) {
    if (value == nullptr) return "";
    if (value->is_string()) return value->get<std::string>();
    Fail(Join("field '", field, "' must hold text, is ", value->type_name()));
    return "";
  }

  const json& row_;
  std::string where_;
  Status status_;
};

std::vector<std::string> Letters(size_t count) {
  std::vector<std::string> letters;
  for (size_t i = 0; i < count; ++i) letters.emplace_back(1, static_cast<char>('A' + i));
  return letters;
}

std::string LetteredBody(std::string_view head, const std::vector<std::string>& answers) {
  std::string body(head);
  for (size_t i = 0; i < answers.size(); ++i) body += Join("\n", std::string(1, static_cast<char>('A' + i)), ". ", answers[i]);
  return body + "\nAnswer:";
}

// HellaSwag's clean-up of WikiHow text: strip, " [title]" -> ". ", drop "[...]" within a line, one pass of "  " -> " ".
std::string CleanWikiHow(std::string_view text) {
  const std::string titled = ReplaceAll(Strip(text), " [title]", ". ");
  std::string out;
  for (size_t i = 0; i < titled.size(); ++i) {
    if (titled[i] == '[') {
      const size_t end = titled.find_first_of("]\n", i + 1);
      if (end != std::string::npos && titled[end] == ']') {
        i = end;
        continue;
      }
    }
    out += titled[i];
  }
  return ReplaceAll(out, "  ", " ");
}

void FillArc(Row& row, MultipleChoiceItem* item) {
  item->question = row.String("question");
  std::tie(item->answers, item->gold) = row.LabelledChoices();
  item->bodies = {Join("Question: ", item->question, "\nAnswer:")};
}

void FillOpenBook(Row& row, MultipleChoiceItem* item) {
  item->question = row.String("question_stem");
  std::tie(item->answers, item->gold) = row.LabelledChoices();
  item->bodies = {item->question};
}

void FillCommonsense(Row& row, MultipleChoiceItem* item) {
  item->question = Strip(row.String("question"));
  std::tie(item->answers, item->gold) = row.LabelledChoices();
  row.ExpectCount(item->answers, 5, "choices");
  item->choices = Letters(5);
  item->bodies = {LetteredBody(Join("Question: ", item->question), item->answers)};
}

void FillMmlu(Row& row, MultipleChoiceItem* item) {
  item->question = Strip(row.String("question"));
  item->subject = row.String("subject");
  item->answers = row.Strings("choices");
  row.ExpectCount(item->answers, 4, "choices");
  item->gold = row.Label("answer", 0, 4);
  item->choices = Letters(4);
  item->description = Join("The following are multiple choice questions (with answers) about ",
                           ReplaceAll(item->subject, "_", " "), ".\n\n");
  item->bodies = {LetteredBody(item->question, item->answers)};
}

void FillHellaSwag(Row& row, MultipleChoiceItem* item) {
  item->question = CleanWikiHow(
      Join(row.String("activity_label"), ": ", row.String("ctx_a"), " ", Capitalize(row.String("ctx_b"))));
  for (const std::string& ending : row.Strings("endings")) item->answers.push_back(CleanWikiHow(ending));
  row.ExpectCount(item->answers, 4, "endings");
  item->gold = row.Label("label", 0, 4);
  item->bodies = {item->question};
}

void FillPiqa(Row& row, MultipleChoiceItem* item) {
  item->question = row.String("goal");
  item->answers = {row.String("sol1"), row.String("sol2")};
  item->gold = row.Label("label", 0, 2);
  item->bodies = {Join("Question: ", item->question, "\nAnswer:")};
}

void FillSocialIqa(Row& row, MultipleChoiceItem* item) {
  item->question = Join(row.String("context"), " ", row.String("question"));
  item->answers = {row.String("answerA"), row.String("answerB"), row.String("answerC")};
  item->gold = row.Label("label", 1, 3);
  item->bodies = {Join("Q: ", item->question, "\nA:")};
}

// The choice fills the gap, and what follows the gap is scored: the contexts differ, the continuation does not.
void FillWinogrande(Row& row, MultipleChoiceItem* item) {
  const std::string sentence = row.String("sentence");
  item->answers = {row.String("option1"), row.String("option2")};
  item->gold = row.Label("answer", 1, 2);
  const size_t gap = sentence.find('_');
  if (gap == std::string::npos) {
    row.Fail("field 'sentence' has no '_'");
    return;
  }
  const std::string rest = Join(" ", Strip(std::string_view(sentence).substr(gap + 1)));
  for (const std::string& option : item->answers) item->bodies.push_back(sentence.substr(0, gap) + option);
  item->continuations = {rest, rest};
  item->choices = item->bodies;
  if (item->gold >= 0) item->question = item->bodies[static_cast<size_t>(item->gold)];
}

}  // namespace

std::string MultipleChoiceItem::ContextOf(size_t choice) const {
  return Join(description, shots, bodies.size() == 1 ? bodies.front() : bodies.at(choice));
}

std::string MultipleChoiceItem::Shot() const {
  const size_t right = static_cast<size_t>(gold);
  return Join(bodies.size() == 1 ? bodies.front() : bodies.at(right), continuations.at(right));
}

StatusOr<std::string> CanonicalTask(const std::string& name) {
  if (name == "social_iqa" || name == "siqa") return std::string("social_i_qa");
  if (std::find(Tasks().begin(), Tasks().end(), name) != Tasks().end()) return name;
  std::string known;
  for (const std::string& task : Tasks()) known += Join(known.empty() ? "" : ", ", task);
  return InvalidArgument("unknown benchmark '", name, "'; known are ", known);
}

bool HasAccNorm(const std::string& task) {
  return task == "arc_easy" || task == "hellaswag" || task == "openbookqa" || task == "piqa";
}

StatusOr<MultipleChoiceItem> ItemFromRow(const std::string& task, const json& json_row, const std::string& where) {
  MultipleChoiceItem item;
  RF_ASSIGN_OR_RETURN(item.task, CanonicalTask(task));
  Row row(json_row, Join(where, ": ", item.task, " row"));
  if (item.task == "arc_easy") FillArc(row, &item);
  else if (item.task == "commonsense_qa") FillCommonsense(row, &item);
  else if (item.task == "hellaswag") FillHellaSwag(row, &item);
  else if (item.task == "mmlu") FillMmlu(row, &item);
  else if (item.task == "openbookqa") FillOpenBook(row, &item);
  else if (item.task == "piqa") FillPiqa(row, &item);
  else if (item.task == "social_i_qa") FillSocialIqa(row, &item);
  else FillWinogrande(row, &item);
  if (row.status().ok() && item.answers.size() < 2) row.Fail("fewer than two choices");
  RF_RETURN_IF_ERROR(row.status());
  item.row = json_row.dump(-1, ' ', false, json::error_handler_t::replace);
  if (item.choices.empty()) item.choices = item.answers;
  if (item.continuations.empty()) {
    for (const std::string& choice : item.choices) item.continuations.push_back(Join(" ", choice));
  }
  return item;
}

StatusOr<std::vector<MultipleChoiceItem>> ReadItems(const std::string& task, const std::filesystem::path& jsonl,
                                                    size_t limit) {
  std::vector<MultipleChoiceItem> items;
  RF_RETURN_IF_ERROR(ForEachJsonLine(jsonl, limit, [&](const json& row, const std::string& where) -> Status {
    RF_ASSIGN_OR_RETURN(MultipleChoiceItem item, ItemFromRow(task, row, where));
    items.push_back(std::move(item));
    return absl::OkStatus();
  }));
  return items;
}

MultipleChoiceItem WithShots(MultipleChoiceItem item, const std::vector<MultipleChoiceItem>& shots) {
  item.shots.clear();
  item.turns.clear();
  for (const MultipleChoiceItem& shot : shots) {
    item.shots += Join(shot.Shot(), "\n\n");
    const size_t right = static_cast<size_t>(shot.gold);
    item.turns.push_back({shot.bodies.size() == 1 ? shot.bodies.front() : shot.bodies.at(right),
                          shot.continuations.at(right).substr(shot.delimiter.size())});
  }
  return item;
}

namespace {

// The sampler of the harness: k rows of the pool. `exclude` draws one more and leaves copies of the item out.
std::vector<MultipleChoiceItem> DrawShots(const MultipleChoiceItem& item, const std::vector<MultipleChoiceItem>& pool,
                                          size_t k, bool exclude, PythonRandom* random) {
  std::vector<MultipleChoiceItem> shots;
  const size_t drawn = exclude ? k + 1 : k;
  if (pool.size() < drawn) return shots;
  for (const size_t index : random->Sample(pool.size(), drawn)) {
    if (shots.size() < k && !(exclude && pool[index].row == item.row)) shots.push_back(pool[index]);
  }
  if (shots.size() == k) return shots;
  std::vector<const MultipleChoiceItem*> others;
  for (const MultipleChoiceItem& candidate : pool) {
    if (candidate.row != item.row) others.push_back(&candidate);
  }
  shots.clear();
  if (others.size() < k) return shots;
  for (const size_t index : random->Sample(others.size(), k)) shots.push_back(*others[index]);
  return shots;
}

}  // namespace

namespace {

Status PoolTooSmall(const MultipleChoiceItem& item, size_t k, size_t pool) {
  return FailedPrecondition(item.task, item.subject.empty() ? "" : "/", item.subject, ": ", k, " shots asked for, but the pool of ",
                            pool, " rows has too few");
}

}  // namespace

StatusOr<std::vector<MultipleChoiceItem>> WithDrawnShots(const std::vector<MultipleChoiceItem>& items,
                                                         const std::vector<MultipleChoiceItem>& pool, size_t k, bool exclude) {
  std::vector<MultipleChoiceItem> prompted;
  PythonRandom random(1234);
  for (const MultipleChoiceItem& item : items) {
    const std::vector<MultipleChoiceItem> shots = DrawShots(item, pool, k, exclude, &random);
    if (shots.size() < k) return PoolTooSmall(item, k, pool.size());
    prompted.push_back(WithShots(item, shots));
  }
  return prompted;
}

StatusOr<std::vector<MultipleChoiceItem>> WithHarnessShots(const std::vector<MultipleChoiceItem>& items,
                                                           const std::vector<MultipleChoiceItem>& pool, size_t k) {
  if (k == 0 || items.empty()) return items;
  const std::string& task = items.front().task;
  // Tasks without a test split: the items might be in the pool.
  if (task != "mmlu") return WithDrawnShots(items, pool, k, /*exclude=*/task != "arc_easy" && task != "openbookqa");
  std::map<std::string, std::vector<MultipleChoiceItem>> first;
  for (const MultipleChoiceItem& candidate : pool) {
    std::vector<MultipleChoiceItem>& shots = first[candidate.subject];
    if (shots.size() < k) shots.push_back(candidate);
  }
  std::vector<MultipleChoiceItem> prompted;
  for (const MultipleChoiceItem& item : items) {
    if (first[item.subject].size() < k) return PoolTooSmall(item, k, pool.size());
    prompted.push_back(WithShots(item, first[item.subject]));
  }
  return prompted;
}

Example ExampleFromItem(const MultipleChoiceItem& item) {
  const size_t right = static_cast<size_t>(item.gold);
  Example example;
  example.instruction = Join(item.description, item.bodies.size() == 1 ? item.bodies.front() : item.bodies.at(right));
  example.output = item.continuations.at(right).substr(1);
  example.origin = "seed";
  // Letters answer for letters; winogrande's answers are the names, although the text after the gap is what is learned.
  example.choices = item.bodies.size() == 1 ? item.choices : item.answers;
  example.answer_index = item.gold;
  example.extra = {{"question", item.question}, {"task", item.task}};
  return example;
}

}  // namespace refinery::data
