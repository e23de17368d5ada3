#include "worker/task/runtime/torch.h"

#include "worker/task/train/batches.h"

#include <numeric>
#include <random>
#include <utility>

#include "common/digest.h"

namespace refinery::train {

ExampleStream::ExampleStream(std::vector<int64_t> lengths, uint64_t seed) : lengths_(std::move(lengths)), seed_(seed) {
  TORCH_CHECK(!lengths_.empty(), "ExampleStream: no examples");
  Shuffle();
}

void ExampleStream::Shuffle() {
  order_.resize(lengths_.size());
  std::iota(order_.begin(), order_.end(), size_t{0});
  std::mt19937_64 random(DeriveSeed(seed_, Join("epoch/", cursor_.epoch)));
  // Fisher-Yates by hand: std::shuffle differs between standard libraries. The modulo's bias is below 1e-12.
  for (size_t i = order_.size() - 1; i > 0; --i) std::swap(order_[i], order_[random() % (i + 1)]);
}

void ExampleStream::Seek(const DataCursor& cursor) {
  TORCH_CHECK(cursor.epoch >= 0 && cursor.position >= 0 && cursor.position < static_cast<int64_t>(lengths_.size()),
              "ExampleStream: no such place in the data");
  cursor_ = cursor;
  Shuffle();
}

std::vector<size_t> ExampleStream::Next(int64_t tokens) {
  std::vector<size_t> examples;
  for (int64_t used = 0;;) {
    const size_t example = order_[static_cast<size_t>(cursor_.position)];
    if (!examples.empty() && used + lengths_[example] > tokens) return examples;
    examples.push_back(example);
    used += lengths_[example];
    if (++cursor_.position == static_cast<int64_t>(order_.size())) {
      cursor_ = {.epoch = cursor_.epoch + 1, .position = 0};
      Shuffle();
    }
    // A small data set must not stand in one step more often than needed to fill it.
    if (used >= tokens) return examples;
  }
}

std::vector<std::vector<size_t>> SplitByTokens(const std::vector<size_t>& examples,
                                               const std::vector<data::EncodedExample>& all, int64_t tokens) {
  std::vector<std::vector<size_t>> parts;
  int64_t used = 0;
  for (const size_t example : examples) {
    const auto length = static_cast<int64_t>(all[example].tokens.size());
    if (parts.empty() || (tokens > 0 && used + length > tokens)) {
      parts.emplace_back();
      used = 0;
    }
    parts.back().push_back(example);
    used += length;
  }
  return parts;
}

TrainBatch MakeBatch(const std::vector<size_t>& examples, const std::vector<data::EncodedExample>& all,
                     const std::vector<distill::TeacherRows>& teacher, at::Device device) {
  std::vector<int64_t> tokens, positions, targets;
  TrainBatch batch;
  std::vector<at::Tensor> ids, logits, tails, partitions;
  for (const size_t index : examples) {
    const data::EncodedExample& example = all[index];
    const auto begin = static_cast<int64_t>(tokens.size());
    const auto length = static_cast<int64_t>(example.tokens.size());
    tokens.insert(tokens.end(), example.tokens.begin(), example.tokens.end());
    batch.packed.lengths.push_back(length);
    for (int64_t i = example.answer_begin; i < length; ++i) {
      positions.push_back(begin + i - 1);  // the state before a token predicts it
      targets.push_back(example.tokens[static_cast<size_t>(i)]);
    }
    if (teacher.empty()) continue;
    ids.push_back(teacher[index].ids);
    logits.push_back(teacher[index].logits);
    tails.push_back(teacher[index].tail_logits);
    partitions.push_back(teacher[index].tail_log_partitions);
  }
  batch.packed.token_ids = at::tensor(tokens, at::kLong).to(device);
  batch.positions = at::tensor(positions, at::kLong).to(device);
  batch.targets = at::tensor(targets, at::kLong).to(device);
  if (!ids.empty()) {
    batch.teacher = {at::cat(ids).to(device), at::cat(logits).to(device), at::cat(tails).to(device),
                     at::cat(partitions).to(device)};
  }
  return batch;
}

int64_t AnswerTokens(const data::EncodedExample& example) {
  return static_cast<int64_t>(example.tokens.size()) - example.answer_begin;
}

int64_t AnswerTokens(const std::vector<size_t>& examples, const std::vector<data::EncodedExample>& all) {
  int64_t tokens = 0;
  for (const size_t example : examples) tokens += AnswerTokens(all[example]);
  return tokens;
}

}  // namespace refinery::train
