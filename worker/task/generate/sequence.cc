#include "worker/task/generate/sequence.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace refinery::generate {

Sequence::Sequence(uint64_t id, Parts parts)
    : id_(id),
      request_(std::move(parts.request)),
      limit_(parts.limit),
      on_done_(std::move(parts.on_done)),
      tokens_(request_.prompt),
      constraint_(std::move(parts.constraint)) {
  if (parts.tokenizer != nullptr) stream_.emplace(std::move(parts.tokenizer), request_.stop_strings);
  if (!HasPenalties(request_.sampling)) return;
  seen_.emplace();
  for (int32_t token : tokens_) seen_->AddPrompt(token);
}

Status Sequence::Mask(float* logits, int64_t vocab) {
  std::vector<uint32_t> bits;
  RF_RETURN_IF_ERROR(constraint_->Mask(bits));
  for (int64_t token = 0; token < vocab; ++token) {
    const auto word = static_cast<size_t>(token / 32);
    const bool allowed = word < bits.size() && (bits[word] >> (token % 32) & 1) != 0;
    if (!allowed) logits[token] = -std::numeric_limits<float>::infinity();
  }
  return absl::OkStatus();
}

void Sequence::Choose(float* logits, int64_t vocab) {
  static const TokenCounts kNone;
  std::vector<float> raw;  // what follows overwrites them
  if (request_.top_log_probs >= 0) raw.assign(logits, logits + vocab);
  if (constraint_ != nullptr) choice_ = Mask(logits, vocab);
  if (!choice_.ok()) return;
  chosen_ = {};
  chosen_.token = Sample(logits, vocab, request_.sampling, seen_ ? *seen_ : kNone, UniformAt(request_.seed, Generated()));
  if (chosen_.token < 0) choice_ = OutOfRange("the logits of token ", Generated(), " of the answer are not finite");
  if (choice_.ok() && !raw.empty()) FillLogProbs(raw.data(), vocab, request_.top_log_probs, &chosen_);
}

// Whether the answer ends with one of the sequences; `length` becomes its length.
bool Sequence::EndsWithStopSequence(size_t* length) const {
  for (const std::vector<int32_t>& stop : request_.stop_sequences) {
    if (!stop.empty() && stop.size() <= Generated() && std::equal(stop.rbegin(), stop.rend(), tokens_.rbegin())) {
      *length = stop.size();
      return true;
    }
  }
  return false;
}

// The longest end of the answer that a stop sequence begins with: it is not passed on before the next token shows which.
size_t Sequence::TokensThatMayBeAStop() const {
  size_t longest = 0;
  for (const std::vector<int32_t>& stop : request_.stop_sequences) {
    for (size_t length = std::min(stop.size(), Generated() + 1); length-- > longest + 1;) {
      if (std::equal(stop.begin(), stop.begin() + static_cast<std::ptrdiff_t>(length),
                     tokens_.end() - static_cast<std::ptrdiff_t>(length))) {
        longest = length;
      }
    }
  }
  return longest;
}

bool Sequence::Append() {
  const int32_t token = chosen_.token;
  if (!choice_.ok()) {
    Finish("error", choice_);
    return true;
  }
  if (std::ranges::find(request_.end_ids, token) != request_.end_ids.end()) {
    Finish("end");
    return true;
  }
  tokens_.push_back(token);
  if (seen_) seen_->AddAnswer(token);
  if (constraint_ != nullptr) choice_ = constraint_->Accept(token);
  if (request_.top_log_probs >= 0) completion_.log_probs.push_back(std::move(chosen_));
  size_t stop_length = 0;
  if (EndsWithStopSequence(&stop_length)) {
    tokens_.resize(tokens_.size() - stop_length);
    if (request_.top_log_probs >= 0) completion_.log_probs.resize(Generated());
    Finish("stop");
    return true;
  }
  PassOn(Generated() - TokensThatMayBeAStop(), /*last=*/false);
  if (completion_.finish_reason.empty() && constraint_ != nullptr && constraint_->finished()) Finish("end");
  if (completion_.finish_reason.empty() && static_cast<int64_t>(tokens_.size()) >= limit_) Finish("length");
  return !completion_.finish_reason.empty();
}

void Sequence::PassOn(size_t count, bool last) {
  Piece piece;
  const size_t prompt = request_.prompt.size(), first = passed_;
  for (; stream_ && !stream_->stopped() && passed_ < count; ++passed_) {
    StatusOr<std::string> text = stream_->Push(tokens_[prompt + passed_]);
    if (text.ok()) {
      piece.text += *text;
    } else if (completion_.error.ok()) {
      completion_.error = text.status();
    }
  }
  passed_ = count;
  if (last && stream_) {
    StatusOr<std::string> rest = stream_->Finish();
    if (rest.ok()) piece.text += *rest;
  }
  completion_.text += piece.text;
  if (request_.on_piece && (count > first || !piece.text.empty())) {
    piece.tokens = std::span(tokens_).subspan(prompt + first, count - first);
    if (request_.top_log_probs >= 0) piece.log_probs = std::span(completion_.log_probs).subspan(first, count - first);
    request_.on_piece(piece);
  }
  if (last) return;
  if (!completion_.error.ok()) {
    Finish("error", completion_.error);
  } else if (stream_ && stream_->stopped()) {
    Finish("stop");
  }
}

void Sequence::Finish(const std::string& reason, Status error) {
  completion_.finish_reason = reason;
  completion_.error = std::move(error);
  PassOn(Generated(), /*last=*/true);
  // The rest of the text may complete a stop string: one that a withheld character was in the way of.
  if (stream_ && stream_->stopped() && (reason == "length" || reason == "end")) completion_.finish_reason = "stop";
  completion_.tokens.assign(tokens_.begin() + static_cast<std::ptrdiff_t>(request_.prompt.size()), tokens_.end());
  if (on_done_) on_done_(completion_);
}

}  // namespace refinery::generate
