// worker/task/eval/exact_match.h
//
// Exact match of generated answers (lm-evaluation-harness 0.4.13, metric exact_match), and the likelihood of one right answer
// behind a context (its output type "loglikelihood": perplexity with a bootstrapped error, and the share of greedy answers).
//
// Threads: pure functions but for what the given functions do.

#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "worker/task/eval/figures.h"
#include "worker/task/eval/task_set.h"

namespace refinery::eval {

// Greedy answers to the prompts, each ended before a stop string.
using GenerateFn = std::function<StatusOr<std::vector<std::string>>(const std::vector<std::string>& prompts,
                                                                    const ExactMatchRules& rules)>;

struct GeneratedItem {
  std::string prompt_digest, answer, expected;
  bool correct = false;
};

struct ExactMatchResult {
  std::vector<GeneratedItem> items;
  std::vector<Figure> figures;
};

StatusOr<ExactMatchResult> EvaluateExactMatch(const TaskItems& task, const GenerateFn& generate, const PromptOptions& prompt);

// Whether the two are equal once both have lost what the rules ignore.
bool ExactlyMatches(std::string_view answer, std::string_view expected, const ExactMatchRules& rules);

struct AnswerLikelihoods {
  std::vector<data::Score> items;
  std::vector<Figure> figures;       // perplexity = exp(-mean log-likelihood), acc
};
StatusOr<AnswerLikelihoods> EvaluateAnswerLikelihoods(const TaskItems& task, const data::ScoreFn& score,
                                                      const PromptOptions& prompt);

}  // namespace refinery::eval
