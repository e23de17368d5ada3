// worker/task/data/scoring.h
//
// The one thing that judging needs from a model: the log-likelihood of a continuation behind a context. eval/scorer implements
// it with a local model; tests with a table.

#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "common/status.h"

namespace refinery::data {

struct ScoreRequest {
  std::string context;
  std::string continuation;      // with its leading space
};

struct Score {
  double log_likelihood = 0;     // nats, summed over the continuation's tokens
  int64_t tokens = 0;            // of the continuation
  bool is_greedy = false;        // every token is the model's first choice
};

// Scores in the order of the requests.
using ScoreFn = std::function<StatusOr<std::vector<Score>>(const std::vector<ScoreRequest>&)>;

}  // namespace refinery::data
