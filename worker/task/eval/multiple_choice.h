// worker/task/eval/multiple_choice.h
//
// Multiple-choice accuracy as lm-evaluation-harness 0.4.13 reports it. acc: the choice with the largest log-likelihood;
// acc_norm (where the task has it): largest log-likelihood per code point of the choice's text, without its leading space.
// The first choice wins ties. Standard error: sample standard deviation (n - 1) / sqrt(n); mmlu pools its subjects.
//
// Items are scored in blocks of kBlockItems. What shares a forward pass decides the last bits of a log-likelihood; as no pass
// crosses a block, a shard that takes every n-th block finds the same bits as one that takes all of them.

#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "worker/task/data/benchmark.h"
#include "worker/task/data/scoring.h"
#include "worker/task/eval/requests.h"

namespace refinery::eval {

constexpr int64_t kBlockItems = 128;

struct ItemResult {
  int64_t row = 0;                     // index into the items
  std::string subject;                 // mmlu only
  std::string context_digest;          // of the prompts of all choices, see ContextDigest
  int64_t gold = 0;
  int64_t prediction = 0;              // by log-likelihood
  int64_t prediction_norm = 0;         // by log-likelihood per code point
  double margin = 0;                   // best minus second best log-likelihood, nats
  std::vector<double> log_likelihoods;
  std::vector<int64_t> tokens;         // of each continuation
  std::vector<int64_t> characters;     // code points of each choice

  bool correct() const { return prediction == gold; }
  bool correct_norm() const { return prediction_norm == gold; }
};
nlohmann::json ToJson(const ItemResult& item);
// INVALID_ARGUMENT naming `where`.
StatusOr<ItemResult> ItemResultFromJson(const nlohmann::json& json, const std::string& where);

// "sha256:..." over context, U+001F, continuation, U+001E of every request in order.
std::string ContextDigest(const std::vector<data::ScoreRequest>& requests);

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

struct MultipleChoiceOptions {
  PromptOptions prompt;
  std::optional<bool> acc_norm;        // unset: as the task of the first item has it
  int64_t shard = 0, shards = 1;       // of the blocks
};

// Scores every choice of every item (of this shard). INVALID_ARGUMENT for no items.
StatusOr<MultipleChoiceResult> EvaluateMultipleChoice(const std::vector<data::MultipleChoiceItem>& items,
                                                      const data::ScoreFn& score, const MultipleChoiceOptions& options = {});

// The figures of scored items, which may come from several shards: sorted by row, each row once.
StatusOr<MultipleChoiceResult> Summarize(const std::string& task, std::vector<ItemResult> items, bool acc_norm);

// Mean and sample standard error of zeros and ones; the pooled form over groups when `groups` is not empty (one per value).
Accuracy MeanAccuracy(const std::vector<bool>& correct, const std::vector<std::string>& groups);

}  // namespace refinery::eval
