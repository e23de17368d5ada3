// worker/task/data/encoded.h
//
// Tokenised examples: a prompt and an answer. The answer tokens are the ones that are learned and scored.

#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"
#include "worker/task/data/example.h"
#include "worker/task/tokenizer/tokenizer.h"

namespace refinery::data {

struct EncodedExample {
  std::vector<int32_t> tokens;     // prompt + answer (+ end token)
  int64_t answer_begin = 0;        // index of the first answer token; >= 1
  std::string key;                 // digest of the token ids and answer_begin (see TokenKey); names the row of a logit cache
};

// "sha256:..." over the little-endian int32 ids, preceded by answer_begin as int64.
std::string TokenKey(const std::vector<int32_t>& tokens, int64_t answer_begin);

// Context and continuation of one scored text, tokenised exactly as lm-evaluation-harness 0.4.13 does: the context's trailing
// white space moves to the continuation; continuation ids are those of the whole text after as many as the context has; an
// empty context becomes the BOS (else EOS) token. The model's input is context ++ continuation.
struct EncodedPair {
  std::vector<int32_t> context;       // at least one
  std::vector<int32_t> continuation;  // may be empty when merges swallow it
};
// `special_tokens`: the tokenizer's own rule for BOS applies (false: never a BOS, as the harness did up to 0.4.9.1).
StatusOr<EncodedPair> EncodePair(std::string_view context, std::string_view continuation,
                                 const tokenizer::Tokenizer& tokenizer, bool special_tokens = true);
// One text by the same rule: no second BOS where the text begins with one.
StatusOr<std::vector<int32_t>> EncodeText(std::string_view text, const tokenizer::Tokenizer& tokenizer,
                                          bool special_tokens = true);

// instruction (+ "\n" + input).
std::string PromptOf(const Example& example);

// prompt = instruction (+ "\n" + input when there is one); answer = " " + output, tokenised together as lm-eval does
// (trailing whitespace of the prompt moves to the answer; the answer ids are those after the prompt's). The tokenizer's end
// token is appended as the last answer token where `append_end` is set.
StatusOr<EncodedExample> Encode(const Example& example, const tokenizer::Tokenizer& tokenizer, bool append_end);

// The same answer ids behind a longer prompt: context text + prompt, for a teacher that sees more than the student.
// Returns tokens = encoded(context) ++ student tokens, answer_begin shifted accordingly. The key stays the student's:
// it names the row that the student will look up.
EncodedExample WithContext(const EncodedExample& example, const std::vector<int32_t>& context);

}  // namespace refinery::data
