// worker/task/train/batches.h
//
// Which examples make an optimizer step, and how they lie in one packed batch.
//
// Order: every epoch is a permutation of all examples, derived from (seed, epoch) alone, so that the place in the
// data is two integers. A step takes examples in that order while they fit; an example longer than the budget is a
// step of its own. Epochs join without a gap.  Threads: none of this is shared.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "worker/task/data/encoded.h"
#include "worker/task/distill/logit_cache.h"
#include "worker/task/model/causal_lm.h"

namespace refinery::train {

// Where the next step begins.
struct DataCursor {
  int64_t epoch = 0;
  int64_t position = 0;  // in the epoch's permutation, < number of examples
};

class ExampleStream {
 public:
  // lengths: tokens of each example; at least one.
  ExampleStream(std::vector<int64_t> lengths, uint64_t seed);

  // Examples of the next step: at most `tokens` together, at least one.
  std::vector<size_t> Next(int64_t tokens);

  const DataCursor& cursor() const { return cursor_; }
  void Seek(const DataCursor& cursor);

 private:
  void Shuffle();

  std::vector<int64_t> lengths_;
  uint64_t seed_;
  DataCursor cursor_;
  std::vector<size_t> order_;  // of cursor_.epoch
};

// Splits a list of examples, in order, into parts of at most `tokens` each (0 = one part).
std::vector<std::vector<size_t>> SplitByTokens(const std::vector<size_t>& examples,
                                               const std::vector<data::EncodedExample>& all, int64_t tokens);

// One packed batch and what is learned from it. N answer tokens.
struct TrainBatch {
  model::PackedBatch packed;
  at::Tensor positions;          // [N] int64 rows of the hidden states that predict the answer tokens
  at::Tensor targets;            // [N] int64
  distill::TeacherRows teacher;  // rows of the same N tokens; undefined without a teacher
};

// teacher: rows per example like `all`, or empty.
TrainBatch MakeBatch(const std::vector<size_t>& examples, const std::vector<data::EncodedExample>& all,
                     const std::vector<distill::TeacherRows>& teacher, at::Device device);

int64_t AnswerTokens(const data::EncodedExample& example);
int64_t AnswerTokens(const std::vector<size_t>& examples, const std::vector<data::EncodedExample>& all);

}  // namespace refinery::train
