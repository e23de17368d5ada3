#include "worker/task/eval/task_set.h"

#include <algorithm>
#include <map>
#include <set>

#include "worker/task/eval/task_file.h"

namespace refinery::eval {
namespace {

struct Benchmark {
  std::string name, scored, pool;
};

// The split that is scored, and the one that shots are drawn from.
const std::vector<Benchmark>& Benchmarks() {
  static const auto& benchmarks = *new std::vector<Benchmark>{
      {"arc_easy", "test", "train"},     {"commonsense_qa", "validation", "train"}, {"hellaswag", "validation", "train"},
      {"mmlu", "test", "dev"},           {"openbookqa", "test", "train"},           {"piqa", "validation", "train"},
      {"social_i_qa", "validation", "train"}, {"winogrande", "validation", "train"}, {"wikitext", "test", ""}};
  return benchmarks;
}

// The three groups that the harness lists; every other known subject is "stem".
const std::map<std::string, std::set<std::string>>& Subjects() {
  static const auto& subjects = *new std::map<std::string, std::set<std::string>>{
      {"stem",
       {"abstract_algebra", "anatomy", "astronomy", "college_biology", "college_chemistry", "college_computer_science",
        "college_mathematics", "college_physics", "computer_security", "conceptual_physics", "electrical_engineering",
        "elementary_mathematics", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
        "high_school_mathematics", "high_school_physics", "high_school_statistics", "machine_learning"}},
      {"other",
       {"business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging", "management", "marketing",
        "medical_genetics", "miscellaneous", "nutrition", "professional_accounting", "professional_medicine", "virology"}},
      {"social_sciences",
       {"econometrics", "high_school_geography", "high_school_government_and_politics", "high_school_macroeconomics",
        "high_school_microeconomics", "high_school_psychology", "human_sexuality", "professional_psychology",
        "public_relations", "security_studies", "sociology", "us_foreign_policy"}},
      {"humanities",
       {"formal_logic", "high_school_european_history", "high_school_us_history", "high_school_world_history",
        "international_law", "jurisprudence", "logical_fallacies", "moral_disputes", "moral_scenarios", "philosophy",
        "prehistory", "professional_law", "world_religions"}}};
  return subjects;
}

// The benchmark behind a name, or nullptr; `part` becomes the group or subject of mmlu_<part>.
const Benchmark* Find(const std::string& name, std::string* part) {
  part->clear();
  std::string benchmark = name;
  if (name.starts_with("mmlu_")) {
    *part = name.substr(5);
    if (Subjects().count(*part) == 0 && MmluGroupOf(*part).empty()) return nullptr;
    benchmark = "mmlu";
  } else if (name != "wikitext") {
    const auto canonical = data::CanonicalTask(name);
    if (!canonical.ok()) return nullptr;
    benchmark = *canonical;
  }
  for (const Benchmark& candidate : Benchmarks()) {
    if (candidate.name == benchmark) return &candidate;
  }
  return nullptr;
}

StatusOr<std::filesystem::path> SplitFile(const Benchmark& benchmark, const std::string& split, const TaskSource& source) {
  const std::filesystem::path file = source.data / benchmark.name / (split + ".jsonl");
  std::error_code error;
  if (std::filesystem::exists(file, error)) return file;
  return NotFound(benchmark.name, ": ", file.string(), " is not there; `refinery data pull ", benchmark.name,
                  "` brings the benchmark (or name its folder with --data DIR)");
}

std::string KnownNames() {
  std::string names;
  for (const Benchmark& benchmark : Benchmarks()) names += Join(names.empty() ? "" : ", ", benchmark.name);
  for (const std::string& group : MmluGroups()) names += Join(", mmlu_", group);
  return names;
}

// The first `limit` items of every subject (of every task: one subject).
std::vector<data::MultipleChoiceItem> Limited(std::vector<data::MultipleChoiceItem> items, size_t limit) {
  if (limit == 0) return items;
  std::map<std::string, size_t> taken;
  std::vector<data::MultipleChoiceItem> kept;
  for (data::MultipleChoiceItem& item : items) {
    if (++taken[item.subject] <= limit) kept.push_back(std::move(item));
  }
  return kept;
}

}  // namespace

const std::vector<std::string>& MmluGroups() {
  static const auto& groups = *new std::vector<std::string>{"stem", "other", "social_sciences", "humanities"};
  return groups;
}

std::string MmluGroupOf(const std::string& subject) {
  for (const auto& [group, subjects] : Subjects()) {
    if (subjects.count(subject) > 0) return group;
  }
  return "";
}

bool IsKnownTask(const std::string& name) {
  std::string part;
  return Find(name, &part) != nullptr;
}

StatusOr<TaskItems> LoadTaskItems(const std::string& name, const TaskSource& source) {
  if (name.ends_with(".yaml") || name.ends_with(".yml")) return LoadTaskFile(name, source);
  std::string part;
  const Benchmark* benchmark = Find(name, &part);
  if (benchmark == nullptr) {
    return InvalidArgument("there is no task '", name, "'; known are ", KnownNames(),
                           ", mmlu_<subject>, or a task file ending in .yaml");
  }
  TaskItems task{.name = name, .acc_norm = data::HasAccNorm(benchmark->name)};
  RF_ASSIGN_OR_RETURN(const std::filesystem::path file,
                      SplitFile(*benchmark, source.split.empty() ? benchmark->scored : source.split, source));
  if (benchmark->name == "wikitext") {
    task.kind = TaskItems::Kind::kText;
    RF_ASSIGN_OR_RETURN(const std::vector<nlohmann::json> rows, data::ReadJsonLines(file, source.limit));
    for (size_t i = 0; i < rows.size(); ++i) {
      if (!rows[i].contains("page") || !rows[i]["page"].is_string()) {
        return InvalidArgument(file.string(), ":", i + 1, ": wikitext needs the field 'page' with the text of one document");
      }
      task.pages.push_back(rows[i]["page"].get<std::string>());
    }
    return task;
  }
  const bool whole = benchmark->name != "mmlu";
  RF_ASSIGN_OR_RETURN(task.items, data::ReadItems(benchmark->name, file, whole ? source.limit : 0));
  if (!part.empty()) {
    std::erase_if(task.items, [&](const auto& item) { return item.subject != part && MmluGroupOf(item.subject) != part; });
  }
  task.items = Limited(std::move(task.items), source.limit);
  if (task.items.empty()) return InvalidArgument(file.string(), " holds no items of ", name);
  if (source.shots.value_or(0) == 0) return task;
  RF_ASSIGN_OR_RETURN(const std::filesystem::path pool_file,
                      SplitFile(*benchmark, source.pool.empty() ? benchmark->pool : source.pool, source));
  RF_ASSIGN_OR_RETURN(const std::vector<data::MultipleChoiceItem> pool, data::ReadItems(benchmark->name, pool_file));
  RF_ASSIGN_OR_RETURN(task.items, data::WithHarnessShots(task.items, pool, *source.shots));
  return task;
}

}  // namespace refinery::eval
