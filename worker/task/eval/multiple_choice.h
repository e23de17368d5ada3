// worker/task/eval/multiple_choice.h
//
// Multiple-choice accuracy as lm-evaluation-harness 0.4.13 reports it. acc: the choice with the largest log-likelihood;
// acc_norm (where the task has it): largest log-likelihood per code point of the choice's text, without its leading space.
// The first choice wins ties. Standard error: sample standard deviation (n - 1) / sqrt(n); mmlu pools its subjects.

#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "worker/task/data/benchmark.h"
#include "worker/task/data/scoring.h"

namespace refinery::eval {

struct ItemResult {
  int64_t row = 0;                     // index into the items
  int64_t gold = 0;
  int64_t prediction = 0;              // by log-likelihood
  int64_t prediction_norm = 0;         // by log-likelihood per code point
  double margin = 0;                   // best minus second best log-likelihood, nats
  std::vector<double> log_likelihoods;
  std::vector<int64_t> tokens;         // of each continuation
};
nlohmann::json ToJson(const ItemResult& item);

struct Accuracy {
  double value = 0;
  double standard_error = 0;
};

struct MultipleChoiceResult {
  std::string task;
  int64_t count = 0;
  Accuracy acc;
  std::optional<Accuracy> acc_norm;
  std::vector<ItemResult> items;
};

// Scores every choice of every item. INVALID_ARGUMENT for no items.
StatusOr<MultipleChoiceResult> EvaluateMultipleChoice(const std::vector<data::MultipleChoiceItem>& items,
                                                      const data::ScoreFn& score);

// Mean and sample standard error of zeros and ones; the pooled form over groups when `groups` is not empty (one per value).
Accuracy MeanAccuracy(const std::vector<bool>& correct, const std::vector<std::string>& groups);

}  // namespace refinery::eval
