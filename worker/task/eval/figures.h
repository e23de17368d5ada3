// worker/task/eval/figures.h
//
// What an evaluation prints: one figure a line with its standard error and count, as the harness reports them, and the paired
// comparison of two models on the same items.
//
// Threads: pure functions.

#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "worker/task/eval/multiple_choice.h"
#include "worker/task/eval/perplexity.h"
#include "worker/task/eval/statistics.h"

namespace refinery::eval {

struct Figure {
  std::string task;                        // "arc_easy", "mmlu", "mmlu_stem", "mmlu_anatomy"
  std::string metric;                      // "acc", "acc_norm", "word_perplexity"
  double value = 0;
  std::optional<double> standard_error;    // none where the harness says N/A: perplexities of pages, fewer than two items
  int64_t count = 0;                       // items, or pages
  int level = 0;                           // of indentation: a group's tasks stand below it
};

// mmlu: first all subjects, then each group with its subjects; a group (mmlu_stem): all, then its subjects. Sizes weigh.
std::vector<Figure> FiguresOf(const std::string& name, const MultipleChoiceResult& result);
std::vector<Figure> FiguresOf(const std::string& name, const TextResult& result);

// The scores of items by one metric (0 or 1), by row: what is compared and exported.
struct ScoredItems {
  std::string task, metric;
  std::vector<double> scores;
};
std::vector<ScoredItems> ScoresOf(const std::string& name, const MultipleChoiceResult& result);

struct Comparison {
  std::string task, metric;
  double a = 0, b = 0;
  int64_t count = 0;
  PairedDifference paired;
};
// INVALID_ARGUMENT when the two did not score the same items.
StatusOr<std::vector<Comparison>> Compare(const std::vector<ScoredItems>& a, const std::vector<ScoredItems>& b);

std::string TableOf(const std::vector<Figure>& figures);
std::string TableOf(const std::vector<Comparison>& comparisons, const std::string& a, const std::string& b);
nlohmann::ordered_json ToJson(const std::vector<Figure>& figures);
nlohmann::ordered_json ToJson(const std::vector<Comparison>& comparisons);

}  // namespace refinery::eval
