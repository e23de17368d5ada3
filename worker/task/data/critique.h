// worker/task/data/critique.h
//
// A judge that is a language model, asked through likelihoods only (no text to parse, so none can fail to parse):
//   pmi   how much likelier the answer is behind its question than behind no question (behind another example's question where
//         the task has no labels), in nats per answer token: "does this answer belong to this question?"
//   yes   P(" Yes") / (P(" Yes") + P(" No")) after "Is the answer correct?", with seeds shown as right and as wrong examples
// score = the mean of both ranks in [0, 1]; the best share is kept. All numbers stay in extra.judge.
//
// Source: pointwise mutual information as a score, Holtzman et al. 2021 (arXiv:2104.08315).  Note that a judge which also wrote
// the answers prefers its own; the report should say so.

#pragma once

#include <cstdint>
#include <vector>

#include "worker/task/data/example.h"
#include "worker/task/data/scoring.h"
#include "worker/task/data/task_format.h"

namespace refinery::data {

struct CritiqueSettings {
  size_t few_shot = 4;          // seeds in both prompts
  double keep_fraction = 0.7;   // of the examples that generation did not refuse; in (0, 1]
  uint64_t seed = 0;
};

// Writes extra.judge = {"answer_log_likelihood", "null_log_likelihood", "answer_tokens", "pmi", "yes", "score", "keep"} into
// every example without extra.rejected; the others stay as they are. INVALID_ARGUMENT for a bad fraction or no seeds.
Status Critique(const TaskFormat& format, const std::vector<Example>& seeds, const CritiqueSettings& settings,
                const ScoreFn& score, std::vector<Example>* examples);

}  // namespace refinery::data
