// worker/task/eval/pair_tree_pass.h
//
// Scores continuation tokens of token trees with a bfloat16 model on the CPU, by the kernels of model/pair_matmul.h and
// model/pair_attention.h: one pass over all layers by a team of threads, no ATen call between; a node looks only at the blocks of
// keys that hold its ancestors; logits are never written out, their log-sum-exp is taken panel by panel in float32.
//
// What tree_forward.h computes, for the models that Works() accepts; rounded to bfloat16 less often.
// Errors: c10::Error on shape bugs.  Threads: one caller at a time.

#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "worker/task/eval/prefix_tree.h"
#include "worker/task/generate/aligned.h"
#include "worker/task/generate/team.h"
#include "worker/task/model/causal_lm.h"
#include "worker/task/model/pair_attention.h"
#include "worker/task/model/pair_matmul.h"

namespace refinery::eval {

// A token behind a wanted node.
struct TargetToken {
  int64_t row = 0;                 // into the wanted nodes
  int64_t token = 0;
};

struct TokenChoice {
  float log_probability = 0;       // nats
  bool greedy = false;             // the model's first choice, the lowest token of equal ones
};

class PairTreePass {
 public:
  // bfloat16 on a CPU with AVX512_BF16, neither packed nor with an adapter attached.
  static bool Works(const model::CausalLm& model);

  explicit PairTreePass(std::shared_ptr<const model::CausalLm> model);

  // `nodes` of the batch that have targets, ascending; `targets` sorted by row. In the order of the targets.
  std::vector<TokenChoice> Score(const TreeBatch& batch, const std::vector<int64_t>& nodes,
                                 const std::vector<TargetToken>& targets);

 private:
  // Up to six (token, head of the group) pairs that share a key-value head, and what they see.
  struct Tile {
    int64_t first = 0, count = 0;           // of token * group + head of the group
    int64_t token = 0, tokens = 0;          // those they belong to
    size_t blocks = 0, block_count = 0;     // into View::blocks
    size_t seen = 0;                        // into View::seen: block_count of each token
  };
  struct View {
    std::vector<Tile> tiles;
    std::vector<int32_t> blocks;
    std::vector<uint16_t> seen;
    size_t most_blocks = 0;
  };

  void Lay(const TreeBatch& batch, const std::vector<int64_t>& nodes);
  View MakeView(const TreeBatch& batch, int64_t window) const;
  void Member(int member, const std::vector<int64_t>& nodes);
  void Layer(size_t index, int member, const std::vector<int64_t>& nodes);
  void PrepareHeads(const model::DecoderLayer& layer, int member);
  void Attend(size_t index, int member);
  void Normalize(const at::Tensor& weight, int64_t rows, int member);
  void Multiply(const std::vector<kernels::PairMatmul>& products, int member);
  std::vector<TokenChoice> Head(int64_t rows, const std::vector<TargetToken>& targets);
  // body(turn) for every turn of [0, turns), by all members; then a barrier. A member takes those of its own share first.
  template <typename Body>
  void TakeTurns(int64_t turns, int member, const Body& body);

  std::shared_ptr<const model::CausalLm> model_;
  const model::ModelConfig& config_;
  const int64_t n_, m_, d_;                 // heads, key-value heads, their size
  generate::Team team_;
  int64_t nodes_ = 0;
  std::map<int64_t, View> views_;           // by sliding window
  at::Tensor cos_, sin_;                    // [nodes, d] float32
  generate::AlignedVector<simd::Bf16> hidden_, normed_, qkv_, context_, gated_, keys_, values_;
  std::vector<generate::AlignedVector<uint32_t>> panel_numbers_;  // per member
  std::vector<kernels::PairPanel> panels_;                 // per member
  std::vector<generate::AlignedVector<float>> scores_;     // per member
  std::vector<kernels::PanelTop> tops_;
  std::vector<std::atomic<int64_t>> turns_;  // taken, of each phase and each member's share
  std::vector<size_t> phase_;                // per member: phases begun
};

}  // namespace refinery::eval
