// worker/task/tokenizer/constraint.h
//
// Constrained decoding: which tokens may come next so that the generated text stays within a JSON schema, a regular
// expression or a Lark grammar. The work is done by the Rust crate llguidance behind worker/task/rust.
//
// Every way to cut an allowed text into tokens is allowed; tokens are never forced on the model. Special tokens are
// allowed only where a Lark grammar names them, end tokens where the text may end.
// Bounds: sources up to 1 MiB, brackets nested up to 100 deep, fixed budgets for the states of the lexer (about 100 MB)
// and for the steps of one mask; a grammar beyond them is an error, never a long wait.
// Errors: INVALID_ARGUMENT for a source that cannot be used (a schema's error names its place as a JSON pointer).
// Threads: a factory may be used by many threads at once, a constraint by one at a time. A constraint does not need its
// factory any longer.

#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "common/status.h"
#include "worker/task/tokenizer/tokenizer.h"

struct RbConstraint;
struct RbConstraintFactory;

namespace refinery::tokenizer {

// The state of one generated text.
class TokenConstraint {
 public:
  ~TokenConstraint();
  TokenConstraint(const TokenConstraint&) = delete;
  TokenConstraint& operator=(const TokenConstraint&) = delete;

  // The tokens that may come next: bit t % 32 of bits[t / 32] for token t of [0, vocab_size()); the words beyond are 0.
  // `bits` is resized to ceil(vocab_size() / 32). After finished() only the end tokens are set. RESOURCE_EXHAUSTED when
  // the grammar needs more steps here than the bounds allow: then the text cannot be continued.
  Status Mask(std::vector<uint32_t>& bits);
  // Appends a token. INVALID_ARGUMENT for one that is not allowed, which changes nothing.
  Status Accept(int32_t token);
  // True when only the end may follow, and after an end token.
  bool finished() const;
  // True when the text so far is complete, though more may be allowed.
  bool can_stop() const;
  int64_t vocab_size() const { return vocab_size_; }

 private:
  friend class ConstraintFactory;
  TokenConstraint(RbConstraint* constraint, int64_t vocab_size) : constraint_(constraint), vocab_size_(vocab_size) {}
  RbConstraint* constraint_;
  int64_t vocab_size_;
};

// What the constraints of one tokenizer share: the bytes of its tokens as a tree. A few tenths of a second for 150,000
// tokens, so made once.
class ConstraintFactory {
 public:
  // vocab_size: rows of the model's head where that is more than the tokenizer's ids (padding rows are never allowed).
  // end_ids: the tokens that end a text; empty: tokenizer.end_ids(). FAILED_PRECONDITION when there is none, or when the
  // tokenizer's decoder does not say which bytes a token stands for (WordPiece).
  static StatusOr<std::shared_ptr<const ConstraintFactory>> Make(const Tokenizer& tokenizer, int64_t vocab_size = 0,
                                                                 std::vector<int32_t> end_ids = {});
  ~ConstraintFactory();
  ConstraintFactory(const ConstraintFactory&) = delete;
  ConstraintFactory& operator=(const ConstraintFactory&) = delete;

  // One JSON value that fits the schema (drafts 4 to 2020-12; references within the schema only). Blanks between its
  // parts: up to 32 in a row; letters stand for themselves (hexadecimal escapes for control characters alone); both unless
  // the schema says otherwise under "x-guidance" (llguidance's JsonCompileOptions).
  StatusOr<std::unique_ptr<TokenConstraint>> FromJsonSchema(std::string_view schema) const;
  // A text that the whole regular expression matches (the syntax of Rust's regex crate, no look-around).
  StatusOr<std::unique_ptr<TokenConstraint>> FromRegex(std::string_view regex) const;
  // A text of the rule `start` (llguidance's form of Lark).
  StatusOr<std::unique_ptr<TokenConstraint>> FromLark(std::string_view grammar) const;
  // Tokens that masks cover.
  int64_t vocab_size() const { return vocab_size_; }

 private:
  ConstraintFactory(RbConstraintFactory* factory, int64_t vocab_size) : factory_(factory), vocab_size_(vocab_size) {}
  StatusOr<std::unique_ptr<TokenConstraint>> New(int kind, std::string_view what, std::string_view source) const;
  RbConstraintFactory* factory_;
  int64_t vocab_size_;
};

}  // namespace refinery::tokenizer
