// worker/task/generate/sequence.h
//
// One request on its way: its tokens, its text, and when it ends. The engine decides when it is computed; a Sequence takes the
// logits and says whether it goes on.
//
// Threads: Choose of different sequences may run at the same time; everything else belongs to the thread that drives the engine.

#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "worker/task/generate/request.h"
#include "worker/task/generate/sampler.h"
#include "worker/task/generate/text_stream.h"
#include "worker/task/tokenizer/constraint.h"

namespace refinery::generate {

class Sequence {
 public:
  using OnDone = std::function<void(const Completion&)>;
  struct Parts {
    Request request;
    int64_t limit = 0;                                       // most tokens, prompt included
    std::shared_ptr<const tokenizer::Tokenizer> tokenizer;   // null: there is no text
    std::unique_ptr<tokenizer::TokenConstraint> constraint;  // null: none
    OnDone on_done;
  };
  Sequence(uint64_t id, Parts parts);

  uint64_t id() const { return id_; }
  const Request& request() const { return request_; }
  // Prompt and answer so far.
  const std::vector<int32_t>& tokens() const { return tokens_; }
  int64_t limit() const { return limit_; }

  // Picks the next token from its logits [vocab], which are modified.
  void Choose(float* logits, int64_t vocab);
  // Appends what Choose picked and passes on what is new. Returns whether the request is finished (Finish has been called).
  bool Append();
  // Ends it: passes on the rest of the text, then the completion.
  void Finish(const std::string& reason, Status error = absl::OkStatus());

 private:
  // Sets the logits of tokens that the constraint forbids to -infinity.
  Status Mask(float* logits, int64_t vocab);
  bool EndsWithStopSequence(size_t* length) const;
  size_t TokensThatMayBeAStop() const;
  // Passes on tokens [passed_, count) of the answer and their text.
  void PassOn(size_t count, bool last);
  size_t Generated() const { return tokens_.size() - request_.prompt.size(); }

  const uint64_t id_;
  const Request request_;
  const int64_t limit_;
  const OnDone on_done_;
  std::vector<int32_t> tokens_;
  const std::unique_ptr<tokenizer::TokenConstraint> constraint_;
  std::optional<TokenCounts> seen_;     // with penalties
  std::optional<TextStream> stream_;    // with a tokenizer
  TokenLogProb chosen_;                 // by Choose
  Status choice_;                       // why it could not choose
  Completion completion_;
  size_t passed_ = 0;                   // tokens of the answer that went to the stream and to on_piece
};

}  // namespace refinery::generate
