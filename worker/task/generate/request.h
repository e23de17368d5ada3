// worker/task/generate/request.h
//
// What is asked of the generation engine and what comes back: plain values, no LibTorch.
//
// Threads: values.

#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "common/status.h"

namespace refinery::generate {

// Applied in this order: penalties, temperature, top-k, top-p, min-p (the order of transformers' generate; presence and
// frequency penalty, which transformers lacks, follow the repetition penalty as in vLLM).
struct SamplingSettings {
  double temperature = 1.0;         // >= 0; below 1e-5 = greedy
  double top_p = 1.0;               // in [0, 1]: the likeliest tokens whose probability reaches it; 0 = the likeliest alone
  int64_t top_k = 0;                // the k likeliest and those equal to the last of them; 0 = off, 1 = greedy
  double repetition_penalty = 1.0;  // > 0; over prompt and answer: positive logits are divided by it, negative multiplied
  double min_p = 0.0;               // in [0, 1]: tokens at least this times as likely as the likeliest
  double presence_penalty = 0.0;    // in [-2, 2]: subtracted from the logit of every token that the answer holds
  double frequency_penalty = 0.0;   // in [-2, 2]: the same, times the number of its occurrences in the answer
};

// Natural logarithms of probabilities: the log-softmax of the model's own logits, before penalties, temperature and masks.
struct TokenLogProb {
  int32_t token = 0;
  float log_prob = 0;
  std::vector<std::pair<int32_t, float>> top;  // the likeliest tokens, likeliest first; of equal ones the smaller token
};

// What one step added to a request's answer. The spans hold until the callback returns.
struct Piece {
  std::string text;                           // whole characters, none of which can belong to a stop string; may be empty
  std::span<const int32_t> tokens;
  std::span<const TokenLogProb> log_probs;    // of these tokens, where asked for
};

// What the answer must be, from its first character to its last (see worker/task/tokenizer/constraint.h).
struct Constraint {
  enum class Kind { kNone, kJsonSchema, kRegex, kLark };
  Kind kind = Kind::kNone;
  std::string source;
};

struct Request {
  std::vector<int32_t> prompt;     // at least one token
  int64_t max_new_tokens = 64;
  SamplingSettings sampling;
  uint64_t seed = 0;               // the request's own stream of random numbers: its text does not depend on its batch mates
  std::vector<int32_t> end_ids;    // generation stops after one of them (it is not part of the output)
  std::vector<std::vector<int32_t>> stop_sequences;  // ids; checked as suffixes, not part of the output
  // Text at which the answer ends, wherever the tokens' borders lie; it is not part of `text`. Needs a tokenizer.
  std::vector<std::string> stop_strings;
  int64_t top_log_probs = -1;      // -1 = no log-probabilities; n >= 0: of each token, and of the n likeliest in its place
  // Tokens that cannot continue a text of this kind are never chosen; the answer ends when it is complete. Needs a tokenizer,
  // whose end_ids also end it.
  Constraint constraint;
  std::function<void(const Piece&)> on_piece;        // called by the thread that drives the engine
};

struct Completion {
  std::vector<int32_t> tokens;     // with a stop string: also those that spell it
  std::string finish_reason;       // "end", "stop", "length", "cancelled", "error"
  std::string text;                // of the tokens, without special ones; empty without a tokenizer
  std::vector<TokenLogProb> log_probs;  // one for each token, where asked for
  // Why, when finish_reason is "error": OUT_OF_RANGE for logits that are not finite, RESOURCE_EXHAUSTED for a constraint that
  // takes too long, INVALID_ARGUMENT for a token that the tokenizer does not know.
  Status error;
};

// INVALID_ARGUMENT naming the field and its bounds.
Status CheckSampling(const SamplingSettings& settings);

}  // namespace refinery::generate
