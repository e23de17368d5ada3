// worker/task/generate/cpu_forward.h
//
// Cached attention on the CPU by hand-written kernels, for float32 and bfloat16 models. Few tokens (decoding): the whole pass over
// all layers is one region of a Team with barriers, no ATen call in it (cpu_decode.cc). Many tokens (prompts): ATen's matrix
// products, the same kernels between (cpu_forward.cc). Packed weights (model/packed_weight.h) are read as they are by the former and
// expanded a layer at a time by the latter.
//
// T is float or simd::Bf16, the model's dtype.  Errors and threads as forward.h.

#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <type_traits>
#include <vector>

#include "worker/task/generate/aligned.h"
#include "worker/task/generate/forward.h"
#include "worker/task/model/pair_attention.h"
#include "worker/task/generate/team.h"

namespace refinery::generate {

using simd::Bf16;

constexpr int64_t kCapacityUnit = 64;   // cache capacity in positions is a multiple of this
constexpr int64_t kRotaryBytes = 2 * sizeof(float);  // cos_ and sin_, per position and dimension of a head

template <typename T>
T* Data(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

template <typename T>
class CpuForward final : public Forward {
 public:
  explicit CpuForward(std::shared_ptr<const model::CausalLm> model)
      : model_(std::move(model)), config_(model_->config()), all_(at::get_num_threads()), team_(&all_),
        turns_(static_cast<size_t>(model_->config().num_layers)) {
    n_ = config_.num_heads;
    m_ = config_.num_kv_heads;
    d_ = config_.head_dim;
    paired_ = std::is_same_v<T, Bf16> && kernels::PairAttentionWorks(d_);
  }

  bool Reserve(int64_t slots, int64_t capacity) override;
  void Release() override {
    keys_.clear();
    values_.clear();
    slots_ = capacity_ = 0;
  }
  int64_t CacheBytes(int64_t slots, int64_t capacity) const override {
    const int64_t positions = (capacity + kCapacityUnit - 1) / kCapacityUnit * kCapacityUnit;
    return positions * d_ * (2 * slots * m_ * config_.num_layers * static_cast<int64_t>(sizeof(T)) + kRotaryBytes);
  }
  // Every sum of StepFew runs over one token's own numbers in an order that the number of tokens does not change.
  bool RowInvariant(StepKind kind) const override { return kind == StepKind::kDecode; }
  void CopyPrefix(int64_t from, int64_t to, int64_t length) override;
  at::Tensor Step(const StepBatch& batch) override;

 private:
  struct Token {
    int64_t id, slot, position;
  };
  // Queries that share a key-value head: `count` consecutive ones of the (token, head of the group) pairs of one run.
  struct Tile {
    int64_t head, first, count;  // first: of token * group + head of the group, over all tokens of the step
  };

  void Lay(const StepBatch& batch);  // tokens_, wanted_, scratch sizes
  at::Tensor StepFew();
  at::Tensor StepMany(const StepBatch& batch);

  // Decoding.
  void Member(int member, float* logits);
  void MemberLayer(size_t index, int member);
  void Head(int member, float* logits);
  // normed_[member] = norms of all tokens: cheaper to compute by every member than to wait for.
  void NormalizeAll(const at::Tensor& weight, int member);
  // Waits for all members while the first weights of the next product come; returns the member's share of its outputs.
  Share Meet(int member, std::initializer_list<const model::Linear*> layers);
  // Outputs [begin, end) of y [tokens, outputs] (+)= x W^T + bias.
  void Multiply(const model::Linear& linear, const T* x, float* y, int64_t y_stride, bool accumulate, int64_t begin,
                int64_t end) const;
  void MultiplyQkv(const model::DecoderLayer& layer, const T* x, int64_t begin, int64_t end);

  // The tokens that a member prepares. Two neighbouring positions of a slot share the cells of a pair of values, which one
  // member has to write.
  Share PrepareShare(int member) const;
  // Head norms and rotary embedding of token t, whose row of qkv_ is float32; its keys and values go to the cache.
  void Prepare(const model::DecoderLayer& layer, size_t index, int64_t t) {
    for (int64_t head = 0; head < m_; ++head) PrepareHead(layer, index, t, head);
  }
  // The same for one key-value head and the queries that share it.
  void PrepareHead(const model::DecoderLayer& layer, size_t index, int64_t t, int64_t head);
  // All (token, key-value head) pairs, or all tiles, in turns; where lone_, after preparing them.
  void AttendItems(size_t index, T* context, AlignedVector<float>& scores, int64_t turn);
  void AttendTiles(size_t index, T* context, AlignedVector<float>& scores, int64_t turn);
  void LayTiles(const StepBatch& batch);
  // The first position that a query at `position` sees in that layer.
  int64_t FirstSeen(size_t layer, int64_t position) const {
    const int64_t window = model_->layers[layer].sliding_window;
    return window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
  }

  int64_t Tokens() const { return static_cast<int64_t>(tokens_.size()); }
  T* Keys(size_t layer, int64_t slot, int64_t head) const {
    return Data<T>(keys_[layer]) + (slot * m_ + head) * capacity_ * d_;
  }
  T* Values(size_t layer, int64_t slot, int64_t head) const {
    return Data<T>(values_[layer]) + (slot * m_ + head) * capacity_ * d_;
  }

  const std::shared_ptr<const model::CausalLm> model_;
  const model::ModelConfig& config_;
  Team all_, alone_{1};
  Team* team_;                             // the one that runs the current step
  int64_t n_ = 0, m_ = 0, d_ = 0;
  bool paired_ = false;                    // the cache is laid out as pair_attention.h says, not as cpu_kernels.h says
  int64_t slots_ = 0, capacity_ = 0;
  std::vector<at::Tensor> keys_, values_;  // per layer
  at::Tensor cos_, sin_;                   // [capacity, d]

  // Of the current step.
  std::vector<Token> tokens_;
  std::vector<Tile> tiles_;                // where paired_
  std::vector<int64_t> wanted_;            // rows of tokens_ whose logits are wanted
  bool lone_ = false;                      // one token a run, one tile a (token, key-value head): no query needs another's key
  std::vector<std::atomic<int64_t>> turns_;  // of each layer's attention: the next tile that nobody has
  std::vector<AlignedVector<float>> scores_;  // per member
  AlignedVector<float> hidden_, qkv_, gate_up_;
  std::vector<AlignedVector<T>> normed_;   // per member
  AlignedVector<T> context_, product_;
};

}  // namespace refinery::generate
