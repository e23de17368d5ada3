#include "worker/task/eval/prefix_tree.h"

#include <algorithm>
#include <numeric>

namespace refinery::eval {
namespace {

int64_t CommonPrefix(const std::vector<int32_t>& a, const std::vector<int32_t>& b) {
  const auto mismatch = std::mismatch(a.begin(), a.end(), b.begin(), b.end());
  return mismatch.first - a.begin();
}

// Grows one batch, sequence after sequence in sorted order.
class Builder {
 public:
  explicit Builder(const TreeLimits& limits) : limits_(limits) {}

  void Add(size_t index, const TreeSequence& sequence) {
    const int64_t length = static_cast<int64_t>(sequence.tokens.size());
    int64_t shared = previous_ == nullptr ? 0 : CommonPrefix(*previous_, sequence.tokens);
    const int64_t block_size = batch_.blocks.empty() ? 0 : static_cast<int64_t>(batch_.blocks.back().parents.size());
    const bool same_input = shared == length;
    if (shared < limits_.min_shared && !same_input) shared = 0;
    if (shared > 0 && !same_input && block_size + length - shared > limits_.block_tokens) shared = 0;
    if (shared == 0) StartBlock(length);
    Append(index, sequence, shared);
    previous_ = &sequence.tokens;
  }

  std::vector<TreeBatch> Finish() {
    Close();
    return std::move(batches_);
  }

 private:
  void Close() {
    if (!batch_.token_ids.empty()) batches_.push_back(std::move(batch_));
    batch_ = {};
  }

  void StartBlock(int64_t length) {
    if (static_cast<int64_t>(batch_.token_ids.size()) + length > limits_.batch_tokens) Close();
    batch_.blocks.push_back({.begin = static_cast<int64_t>(batch_.token_ids.size())});
    path_.clear();
  }

  void Append(size_t index, const TreeSequence& sequence, int64_t shared) {
    TreeBlock& block = batch_.blocks.back();
    path_.resize(static_cast<size_t>(shared));
    for (size_t i = static_cast<size_t>(shared); i < sequence.tokens.size(); ++i) {
      const int64_t parent = path_.empty() ? -1 : path_.back() - block.begin;
      const int64_t node = static_cast<int64_t>(batch_.token_ids.size());
      if (parent != node - block.begin - 1) block.chain = false;
      block.parents.push_back(parent);
      batch_.token_ids.push_back(sequence.tokens[i]);
      batch_.positions.push_back(static_cast<int64_t>(i));
      path_.push_back(node);
    }
    batch_.paths.push_back({index, {path_.end() - static_cast<std::ptrdiff_t>(sequence.kept), path_.end()}});
  }

  const TreeLimits limits_;
  std::vector<TreeBatch> batches_;
  TreeBatch batch_;
  std::vector<int64_t> path_;                       // nodes of the previous sequence
  const std::vector<int32_t>* previous_ = nullptr;
};

}  // namespace

std::vector<TreeBatch> PlanTrees(const std::vector<TreeSequence>& sequences, const TreeLimits& limits) {
  std::vector<size_t> order(sequences.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return sequences[a].tokens < sequences[b].tokens; });
  Builder builder(limits);
  for (const size_t index : order) builder.Add(index, sequences[index]);
  return builder.Finish();
}

}  // namespace refinery::eval
