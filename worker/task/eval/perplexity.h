// worker/task/eval/perplexity.h
//
// How well a model predicts the answers of examples, and plain text.
//
// Text: the rolling log-likelihood of lm-evaluation-harness 0.4.13: the first window is the BOS (else EOS) token and the first
// L - 1 tokens of context for the first L tokens; later windows predict the next L tokens with one token of context; the last
// window of n tokens gets up to L - n + 1. L is the model's maximum length, or less where `window` says so.
// Words and bytes are counted in the original page, before WikiText's detokenisation.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "worker/task/data/encoded.h"
#include "worker/task/eval/scorer.h"

namespace refinery::eval {

struct AnswerResult {
  int64_t examples = 0;
  int64_t tokens = 0;               // of the answers
  double loss = 0;                  // nats per answer token
  double loss_standard_error = 0;   // over examples (ratio estimator)
  double perplexity = 0;            // exp(loss)
  double token_accuracy = 0;        // answer tokens that are the model's first choice, given the true ones before
  double exact_answers = 0;         // examples in which all of them are
  double exact_standard_error = 0;
  std::vector<TokenScore> per_example;
};

// INVALID_ARGUMENT for no examples.
StatusOr<AnswerResult> EvaluateAnswers(const std::vector<data::EncodedExample>& examples, Scorer& scorer);

struct TextResult {
  double log_likelihood = 0;        // nats, over all pages
  int64_t tokens = 0, words = 0, bytes = 0;
  double word_perplexity = 0, byte_perplexity = 0, bits_per_byte = 0, token_perplexity = 0;
  std::vector<double> per_page;     // log-likelihoods
  std::vector<int64_t> page_tokens, page_words, page_bytes;
};

struct TextOptions {
  int64_t window = 1024;            // L; cut to the model's maximum length
  bool special_tokens = true;       // the tokenizer's own BOS rule (harness.h)
  bool detokenize_wikitext = true;  // undo WikiText's spacing before scoring, as the harness does
};

StatusOr<TextResult> EvaluateText(const std::vector<std::string>& pages, const tokenizer::Tokenizer& tokenizer,
                                  const TextOptions& options, int64_t model_max_length, Scorer& scorer);

// The windows of one page: context and the tokens that are predicted. For tests and other users of windows.
std::vector<data::EncodedPair> RollingWindows(const std::vector<int32_t>& tokens, int32_t prefix, int64_t window);

// The harness' wikitext_detokenizer.
std::string DetokenizeWikiText(std::string_view page);
// len(re.split(r"\s+", page)): empty strings at the ends count.
int64_t CountWords(std::string_view page);

}  // namespace refinery::eval
