#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>

#include "worker/task/eval/scorer.h"
#include "worker/task/eval/tree_forward.h"

namespace refinery::eval {
namespace {

constexpr int64_t kPairBatch = 2048;  // nodes; a panel of weights is laid out once for all of them

struct Targets {
  std::vector<int64_t> nodes;         // wanted, each once, ascending
  std::vector<TargetToken> tokens;    // sorted by node
  std::vector<size_t> sequences;      // of each token
};

// Choices that share a node share its row of logits.
Targets CollectTargets(const TreeBatch& batch, const std::vector<data::EncodedPair>& pairs) {
  std::map<int64_t, std::vector<std::pair<int64_t, size_t>>> by_node;
  for (const TreePath& path : batch.paths) {
    for (size_t i = 0; i < path.nodes.size(); ++i) {
      by_node[path.nodes[i]].emplace_back(pairs[path.sequence].continuation[i], path.sequence);
    }
  }
  Targets targets;
  for (const auto& [node, wanted] : by_node) {
    for (const auto& [token, sequence] : wanted) {
      targets.tokens.push_back({.row = static_cast<int64_t>(targets.nodes.size()), .token = token});
      targets.sequences.push_back(sequence);
    }
    targets.nodes.push_back(node);
  }
  return targets;
}

struct Chosen {
  at::Tensor log_probabilities;   // float32, on the CPU
  at::Tensor greedy;              // bool: the token is its row's first choice, the lower token of equal ones
};

// Of token_index[i] in row row_index[i]. `logits` [rows, V] float32 is used up: at 49,152 entries a row its passes cost as much as
// a layer, so the shifted exponentials take its place, and only rows whose target is a maximum are searched for it.
// log_softmax of ATen on the CPU is off by 9e-6 nats over 49,152 entries; logits - logsumexp is not.
Chosen Choose(at::Tensor logits, const at::Tensor& row_index, const at::Tensor& token_index) {
  const at::Tensor picked = logits.index({row_index, token_index});
  const at::Tensor top = logits.amax(1, /*keepdim=*/true);
  at::Tensor greedy = picked.eq(top.squeeze(1).index_select(0, row_index));
  if (const at::Tensor candidates = greedy.nonzero().squeeze(1); candidates.numel() > 0) {
    const at::Tensor first = logits.index_select(0, row_index.index_select(0, candidates)).argmax(1);
    greedy = greedy.index_put({candidates}, first.eq(token_index.index_select(0, candidates)));
  }
  const at::Tensor log_sum = logits.sub_(top).exp_().sum(1).log_().add_(top.squeeze(1));
  return {(picked - log_sum.index_select(0, row_index)).to(at::kCPU), greedy.to(at::kCPU)};
}

}  // namespace

Scorer::Scorer(std::shared_ptr<const model::CausalLm> model, std::shared_ptr<const tokenizer::Tokenizer> tokenizer,
               runtime::Reporter& reporter, const ScorerOptions& options)
    : model_(std::move(model)), tokenizer_(std::move(tokenizer)), reporter_(reporter), options_(options) {
  if (options_.max_length <= 0) options_.max_length = model_->config().max_position;
  if (PairTreePass::Works(*model_)) pairs_ = std::make_unique<PairTreePass>(model_);
  // Attention of the pair kernels costs what a node's ancestors cost: whatever is shared is worth sharing. ATen's costs the square
  // of a block.
  limits_ = options_.limits.value_or(pairs_ != nullptr ? TreeLimits{.batch_tokens = kPairBatch, .block_tokens = kPairBatch, .min_shared = 1}
                                                       : TreeLimits{});
}

void Scorer::Expect(std::string phase, int64_t requests) {
  phase_ = std::move(phase);
  expected_ = requests;
  finished_ = 0;
}

data::ScoreFn Scorer::AsScoreFn() {
  return [this](const std::vector<data::ScoreRequest>& requests) { return Score(requests); };
}

StatusOr<std::vector<data::Score>> Scorer::Score(const std::vector<data::ScoreRequest>& requests) {
  if (tokenizer_ == nullptr) return FailedPrecondition("this scorer was made without a tokenizer");
  std::vector<data::EncodedPair> pairs;
  pairs.reserve(requests.size());
  for (const data::ScoreRequest& request : requests) {
    RF_ASSIGN_OR_RETURN(data::EncodedPair pair, data::EncodePair(request.context, request.continuation, *tokenizer_,
                                                                options_.special_tokens));
    if (pair.continuation.empty()) {
      return InvalidArgument("the continuation '", request.continuation, "' has no tokens of its own behind '",
                             request.context.substr(request.context.size() - std::min<size_t>(40, request.context.size())), "'");
    }
    pairs.push_back(std::move(pair));
  }
  RF_ASSIGN_OR_RETURN(const std::vector<TokenScore> token_scores, ScoreIds(pairs));
  std::vector<data::Score> scores;
  for (const TokenScore& score : token_scores) {
    scores.push_back({score.log_likelihood, score.tokens, score.greedy_tokens == score.tokens});
  }
  return scores;
}

StatusOr<TreeSequence> Scorer::InputOf(const data::EncodedPair& pair) const {
  const int64_t length = static_cast<int64_t>(pair.continuation.size());
  if (length == 0 || pair.context.empty()) return InvalidArgument("a scored pair needs a context and a continuation");
  if (length > options_.max_length) {
    return InvalidArgument("a continuation of ", length, " tokens does not fit into the model's ", options_.max_length);
  }
  TreeSequence sequence{.tokens = pair.context, .kept = length};
  sequence.tokens.insert(sequence.tokens.end(), pair.continuation.begin(), pair.continuation.end());
  sequence.tokens.pop_back();  // the last token is only predicted
  const int64_t surplus = static_cast<int64_t>(sequence.tokens.size()) - options_.max_length;
  if (surplus > 0) sequence.tokens.erase(sequence.tokens.begin(), sequence.tokens.begin() + surplus);
  const int64_t vocabulary = model_->config().vocab_size;
  const auto unknown = [&](int32_t id) { return id < 0 || id >= vocabulary; };
  if (std::any_of(sequence.tokens.begin(), sequence.tokens.end(), unknown) || unknown(pair.continuation.back())) {
    return InvalidArgument("a token is outside the model's vocabulary of ", vocabulary, ": wrong tokenizer for this model");
  }
  return sequence;
}

StatusOr<std::vector<TokenScore>> Scorer::ScoreIds(const std::vector<data::EncodedPair>& pairs) {
  std::vector<TreeSequence> sequences;
  sequences.reserve(pairs.size());
  for (const data::EncodedPair& pair : pairs) {
    RF_ASSIGN_OR_RETURN(TreeSequence sequence, InputOf(pair));
    requested_tokens_ += static_cast<int64_t>(sequence.tokens.size());
    sequences.push_back(std::move(sequence));
  }
  std::vector<TokenScore> scores(pairs.size());
  size_t done = 0;
  int64_t tokens = 0;
  const auto start = std::chrono::steady_clock::now();
  for (const TreeBatch& batch : PlanTrees(sequences, limits_)) {
    reporter_.Check();
    ScoreBatch(batch, pairs, &scores);
    done += batch.paths.size();
    tokens += static_cast<int64_t>(batch.token_ids.size());
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const int64_t all = std::max(expected_, finished_ + static_cast<int64_t>(pairs.size()));
    reporter_.Report({.phase = phase_, .done = static_cast<double>(finished_) + static_cast<double>(done),
                      .total = static_cast<double>(all),
                      .tokens_per_second = static_cast<double>(tokens) / std::max(1e-9, seconds.count())});
  }
  computed_tokens_ += tokens;
  finished_ += static_cast<int64_t>(pairs.size());
  if (finished_ >= expected_) expected_ = finished_ = 0;
  return scores;
}

std::vector<TokenChoice> Scorer::ScoreNodes(const TreeBatch& batch, const std::vector<int64_t>& nodes,
                                            const std::vector<TargetToken>& targets) {
  if (pairs_ != nullptr) return pairs_->Score(batch, nodes, targets);
  const at::Tensor hidden = TreeHidden(*model_, batch, nodes);
  std::vector<TokenChoice> choices;
  for (int64_t begin = 0; begin < hidden.size(0); begin += options_.head_rows) {
    const int64_t rows = std::min(options_.head_rows, hidden.size(0) - begin);
    const at::Tensor logits = model_->Logits(hidden.narrow(0, begin, rows)).to(at::kFloat);
    std::vector<int64_t> row_of, token_of;
    for (size_t next = choices.size(); next < targets.size() && targets[next].row < begin + rows; ++next) {
      row_of.push_back(targets[next].row - begin);
      token_of.push_back(targets[next].token);
    }
    const auto [log_probabilities, greedy] =
        Choose(logits, at::tensor(row_of, at::kLong).to(logits.device()), at::tensor(token_of, at::kLong).to(logits.device()));
    for (size_t i = 0; i < row_of.size(); ++i) {
      choices.push_back({log_probabilities.const_data_ptr<float>()[i], greedy.const_data_ptr<bool>()[i]});
    }
  }
  return choices;
}

void Scorer::ScoreBatch(const TreeBatch& batch, const std::vector<data::EncodedPair>& pairs,
                        std::vector<TokenScore>* scores) {
  const at::NoGradGuard no_grad;
  const Targets targets = CollectTargets(batch, pairs);
  const std::vector<TokenChoice> choices = ScoreNodes(batch, targets.nodes, targets.tokens);
  for (size_t i = 0; i < choices.size(); ++i) {
    const float value = choices[i].log_probability;
    if (!std::isfinite(value) && !(value < 0)) throw runtime::NumericException("scoring: a log-probability is not a number");
    TokenScore& score = (*scores)[targets.sequences[i]];
    score.log_likelihood += value;
    score.greedy_tokens += choices[i].greedy ? 1 : 0;
    ++score.tokens;
  }
}

}  // namespace refinery::eval
