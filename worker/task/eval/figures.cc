#include "worker/task/eval/figures.h"

#include <algorithm>
#include <cstdio>
#include <functional>
#include <map>
#include <set>

#include "worker/task/data/text.h"
#include "worker/task/eval/task_set.h"

namespace refinery::eval {
namespace {

std::string Fixed(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

// Columns as wide as their widest cell; those of `left` are aligned to the left.
std::string Aligned(const std::vector<std::vector<std::string>>& rows, const std::set<size_t>& left) {
  std::vector<size_t> widths(rows.front().size(), 0);
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], data::CodePoints(row[i]));
  }
  std::string text;
  for (const auto& row : rows) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      const std::string space(widths[i] - data::CodePoints(row[i]), ' ');
      line += Join(i == 0 ? "" : "  ", left.count(i) > 0 ? row[i] + space : space + row[i]);
    }
    text += Join(data::StripRight(line), "\n");
  }
  return text;
}

using Keep = std::function<bool(const ItemResult&)>;

// acc (and acc_norm) of the items that `keep` takes; nothing where it takes none.
void AddAccuracies(const std::string& task, const MultipleChoiceResult& result, int level, const Keep& keep,
                   std::vector<Figure>* figures) {
  std::vector<bool> correct, correct_norm;
  std::vector<std::string> groups;
  std::map<std::string, int64_t> sizes;
  for (const ItemResult& item : result.items) {
    if (!keep(item)) continue;
    correct.push_back(item.correct());
    correct_norm.push_back(item.correct_norm());
    groups.push_back(item.subject);
    ++sizes[item.subject];
  }
  // The harness has no standard error for a single item, and none for a group with such a task.
  const bool single = std::any_of(sizes.begin(), sizes.end(), [](const auto& entry) { return entry.second < 2; });
  const auto add = [&](const char* metric, const std::vector<bool>& values) {
    const Accuracy accuracy = MeanAccuracy(values, groups);
    figures->push_back({.task = task, .metric = metric, .value = accuracy.value,
                        .standard_error = single ? std::nullopt : std::optional<double>(accuracy.standard_error),
                        .count = static_cast<int64_t>(values.size()), .level = level});
  };
  if (correct.empty()) return;
  add("acc", correct);
  if (result.acc_norm.has_value()) add("acc_norm", correct_norm);
}

void AddSubjects(const MultipleChoiceResult& result, const std::string& group, int level, std::vector<Figure>* figures) {
  std::set<std::string> subjects;
  for (const ItemResult& item : result.items) {
    if (MmluGroupOf(item.subject) == group) subjects.insert(item.subject);
  }
  for (const std::string& subject : subjects) {
    AddAccuracies("mmlu_" + subject, result, level, [&](const ItemResult& item) { return item.subject == subject; }, figures);
  }
}

}  // namespace

std::vector<Figure> FiguresOf(const std::string& name, const MultipleChoiceResult& result) {
  std::vector<Figure> figures;
  AddAccuracies(name, result, 0, [](const ItemResult&) { return true; }, &figures);
  for (const std::string& group : MmluGroups()) {
    if (name == "mmlu_" + group) AddSubjects(result, group, 1, &figures);
    if (name != "mmlu") continue;
    AddAccuracies("mmlu_" + group, result, 1, [&](const ItemResult& item) { return MmluGroupOf(item.subject) == group; },
                  &figures);
    AddSubjects(result, group, 2, &figures);
  }
  return figures;
}

std::vector<Figure> FiguresOf(const std::string& name, const TextResult& result) {
  const int64_t pages = static_cast<int64_t>(result.per_page.size());
  return {{.task = name, .metric = "word_perplexity", .value = result.word_perplexity, .count = pages},
          {.task = name, .metric = "byte_perplexity", .value = result.byte_perplexity, .count = pages},
          {.task = name, .metric = "bits_per_byte", .value = result.bits_per_byte, .count = pages}};
}

std::vector<ScoredItems> ScoresOf(const std::string& name, const MultipleChoiceResult& result) {
  std::vector<ScoredItems> scored = {{.task = name, .metric = "acc"}};
  if (result.acc_norm.has_value()) scored.push_back({.task = name, .metric = "acc_norm"});
  for (const ItemResult& item : result.items) {
    scored[0].scores.push_back(item.correct() ? 1 : 0);
    if (scored.size() > 1) scored[1].scores.push_back(item.correct_norm() ? 1 : 0);
  }
  return scored;
}

StatusOr<std::vector<Comparison>> Compare(const std::vector<ScoredItems>& a, const std::vector<ScoredItems>& b) {
  std::vector<Comparison> comparisons;
  for (const ScoredItems& first : a) {
    const auto second = std::find_if(b.begin(), b.end(), [&](const ScoredItems& other) {
      return other.task == first.task && other.metric == first.metric;
    });
    if (second == b.end() || second->scores.size() != first.scores.size() || first.scores.empty()) {
      return InvalidArgument("the two models were not scored on the same items of ", first.task);
    }
    comparisons.push_back({.task = first.task, .metric = first.metric, .a = MeanOf(first.scores).mean,
                           .b = MeanOf(second->scores).mean, .count = static_cast<int64_t>(first.scores.size()),
                           .paired = ComparePaired(first.scores, second->scores)});
  }
  return comparisons;
}

std::string TableOf(const std::vector<Figure>& figures) {
  std::vector<std::vector<std::string>> rows = {{"task", "metric", "value", "± error", "n"}};
  for (const Figure& figure : figures) {
    rows.push_back({Join(std::string(2 * static_cast<size_t>(figure.level), ' '), figure.task), figure.metric,
                    Fixed(figure.value, 4), figure.standard_error ? Fixed(*figure.standard_error, 4) : "-",
                    std::to_string(figure.count)});
  }
  return Aligned(rows, {0, 1});
}

std::string TableOf(const std::vector<Comparison>& comparisons, const std::string& a, const std::string& b) {
  std::vector<std::vector<std::string>> rows = {
      {"task", "metric", "A", "B", "A - B", "95 % interval", "only A", "only B", "p (McNemar)"}};
  for (const Comparison& one : comparisons) {
    rows.push_back({one.task, one.metric, Fixed(one.a, 4), Fixed(one.b, 4), Fixed(one.paired.difference, 4),
                    Join(Fixed(one.paired.low, 4), " .. ", Fixed(one.paired.high, 4)), std::to_string(one.paired.only_a),
                    std::to_string(one.paired.only_b), Fixed(one.paired.p_value, 4)});
  }
  return Join("A = ", a, "\nB = ", b, "\n", Aligned(rows, {0, 1}));
}

nlohmann::ordered_json ToJson(const std::vector<Figure>& figures) {
  nlohmann::ordered_json json = nlohmann::ordered_json::array();
  for (const Figure& figure : figures) {
    nlohmann::ordered_json one = {{"task", figure.task}, {"metric", figure.metric}, {"value", figure.value}};
    one["standard_error"] = figure.standard_error ? nlohmann::ordered_json(*figure.standard_error) : nullptr;
    one["count"] = figure.count;
    json.push_back(std::move(one));
  }
  return json;
}

nlohmann::ordered_json ToJson(const std::vector<Comparison>& comparisons) {
  nlohmann::ordered_json json = nlohmann::ordered_json::array();
  for (const Comparison& one : comparisons) {
    json.push_back({{"task", one.task}, {"metric", one.metric}, {"a", one.a}, {"b", one.b}, {"count", one.count},
                    {"difference", one.paired.difference}, {"low", one.paired.low}, {"high", one.paired.high},
                    {"only_a", one.paired.only_a}, {"only_b", one.paired.only_b}, {"mcnemar_p", one.paired.p_value}});
  }
  return json;
}

}  // namespace refinery::eval
