// worker/task/eval/scorer.h
//
// Log-likelihoods of continuations behind contexts, as lm-evaluation-harness 0.4.13 defines them: its tokenisation, its cut of
// over-long inputs from the left, the sum of log-probabilities over the continuation's tokens. Shared prefixes are computed
// once (prefix_tree.h), the head runs only where a continuation token is predicted, and log-probabilities are
// logits - logsumexp in float32 whatever the model's dtype.
//
// Source: reference behaviour of lm_eval/models/huggingface.py, 0.4.13.
// Threads: one Scorer, one thread.

#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/data/encoded.h"
#include "worker/task/data/scoring.h"
#include "worker/task/eval/pair_tree_pass.h"
#include "worker/task/eval/prefix_tree.h"
#include "worker/task/model/causal_lm.h"
#include "worker/task/runtime/reporter.h"
#include "worker/task/tokenizer/tokenizer.h"

namespace refinery::eval {

struct ScorerOptions {
  int64_t max_length = 0;          // tokens of input; 0 = the model's max_position_embeddings
  int64_t head_rows = 256;         // positions per product with the output head
  bool special_tokens = true;      // the tokenizer's own BOS rule holds (harness.h)
  std::optional<TreeLimits> limits;  // default: what suits the way the model is run
};

struct TokenScore {
  double log_likelihood = 0;       // nats
  int64_t tokens = 0;
  int64_t greedy_tokens = 0;       // how many are the model's first choice
};

class Scorer {
 public:
  // `tokenizer` may be null when only ScoreIds is used. `reporter` outlives the scorer.
  Scorer(std::shared_ptr<const model::CausalLm> model, std::shared_ptr<const tokenizer::Tokenizer> tokenizer,
         runtime::Reporter& reporter, const ScorerOptions& options = {});

  // In the order of the requests. INVALID_ARGUMENT for a continuation without tokens or longer than the model's input;
  // throws CancelledException, and NumericException when the model yields NaN.
  StatusOr<std::vector<data::Score>> Score(const std::vector<data::ScoreRequest>& requests);
  StatusOr<std::vector<TokenScore>> ScoreIds(const std::vector<data::EncodedPair>& pairs);

  const ScorerOptions& options() const { return options_; }

  // This scorer as the interface that data/critique wants. The scorer must outlive it.
  data::ScoreFn AsScoreFn();

  // What the next calls of Score will ask for in all, so that progress counts towards it.
  void Expect(std::string phase, int64_t requests);

  // Nodes that went through the model so far, and the tokens that one sequence per request would have cost.
  int64_t computed_tokens() const { return computed_tokens_; }
  int64_t requested_tokens() const { return requested_tokens_; }

 private:
  StatusOr<TreeSequence> InputOf(const data::EncodedPair& pair) const;
  std::vector<TokenChoice> ScoreNodes(const TreeBatch& batch, const std::vector<int64_t>& nodes,
                                      const std::vector<TargetToken>& targets);
  void ScoreBatch(const TreeBatch& batch, const std::vector<data::EncodedPair>& pairs, std::vector<TokenScore>* scores);

  std::shared_ptr<const model::CausalLm> model_;
  std::shared_ptr<const tokenizer::Tokenizer> tokenizer_;
  runtime::Reporter& reporter_;
  ScorerOptions options_;
  TreeLimits limits_;
  std::unique_ptr<PairTreePass> pairs_;   // where it works, else tree_forward.h
  int64_t computed_tokens_ = 0, requested_tokens_ = 0;
  std::string phase_ = "scoring";
  int64_t expected_ = 0, finished_ = 0;   // requests
};

}  // namespace refinery::eval
