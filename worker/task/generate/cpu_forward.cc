// Cached attention on the CPU by hand-written kernels. Few tokens (decoding): the whole pass over all layers is one region of
// a Team with barriers, no ATen call in it. Many tokens (prefill): ATen's matrix products, the same kernels between.

#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "worker/task/generate/cpu_kernels.h"
#include "worker/task/generate/cpu_product.h"
#include "worker/task/generate/forward.h"
#include "worker/task/generate/team.h"
#include "worker/task/model/ops.h"
#include "worker/task/model/projection.h"

namespace refinery::generate {
namespace {

using simd::Bf16;

constexpr int64_t kFewTokens = 32;      // up to here our products beat ATen's
constexpr int64_t kCapacityUnit = 64;   // cache capacity in positions is a multiple of this
constexpr int64_t kRotaryBytes = 2 * sizeof(float);  // cos_ and sin_, per position and dimension of a head
constexpr int64_t kOutputUnit = 16;     // outputs of a product are shared out in whole cache lines
// Products (weights x tokens) of one layer below which barriers cost more than a second thread brings.
constexpr int64_t kWorthSharing = 400000;

template <typename T>
T* Data(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

template <typename T>
class CpuForward final : public Forward {
 public:
  explicit CpuForward(std::shared_ptr<const model::CausalLm> model)
      : model_(std::move(model)), config_(model_->config()), all_(at::get_num_threads()), team_(&all_) {
    n_ = config_.num_heads;
    m_ = config_.num_kv_heads;
    d_ = config_.head_dim;
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

  void Lay(const StepBatch& batch);  // tokens_, wanted_, scratch sizes
  at::Tensor StepFew();
  at::Tensor StepMany(const StepBatch& batch);
  void Member(int member, float* logits);
  void MemberLayer(const model::DecoderLayer& layer, size_t index, int member);

  // y [tokens, outputs] (+)= x W^T + bias, this member's share of the outputs.
  void Multiply(const model::Linear& linear, const T* x, float* y, int64_t y_stride, bool accumulate, int member) const {
    const int64_t outputs = linear.weight.size(0);
    const Share share = ShareOf(outputs, member, team_->size(), kOutputUnit);
    kernels::Product<T>({x, Tokens(), linear.weight.size(1), Data<T>(linear.weight), Data<T>(linear.bias), y, y_stride, accumulate},
                        share.begin, share.end);
  }

  // Head norms and rotary embedding of token t, whose row of qkv_ is float32; its key and value go to the cache.
  void Prepare(const model::DecoderLayer& layer, size_t index, int64_t t);
  // All (token, key-value head) pairs, taken one by one from next_item_.
  void AttendItems(size_t index, T* context, std::vector<float>& scores);

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
  int64_t slots_ = 0, capacity_ = 0;
  std::vector<at::Tensor> keys_, values_;  // per layer, laid out as cpu_kernels.h says
  at::Tensor cos_, sin_;                   // [capacity, d]

  // Of the current step.
  std::vector<Token> tokens_;
  std::vector<int64_t> wanted_;            // rows of tokens_ whose logits are wanted
  std::atomic<int64_t> next_item_{0};
  std::vector<std::vector<float>> scores_; // per member
  std::vector<float> hidden_, qkv_, gate_up_, wanted_hidden_;
  std::vector<T> normed_, context_, product_;
};

template <typename T>
bool CpuForward<T>::Reserve(int64_t slots, int64_t capacity) {
  if (slots <= slots_ && capacity <= capacity_) return false;
  slots_ = std::max(slots, slots_);
  capacity_ = std::max((capacity + kCapacityUnit - 1) / kCapacityUnit * kCapacityUnit, capacity_);
  for (std::vector<at::Tensor>* cache : {&keys_, &values_}) {
    cache->clear();
    // Not touched before it is written: pages that no sequence reaches cost no memory.
    for (int64_t i = 0; i < config_.num_layers; ++i) {
      cache->push_back(at::empty({slots_, m_, capacity_, d_}, model_->embed_tokens.options()));
    }
  }
  // Positions that only the rounding up of the capacity adds are never used.
  const at::Tensor positions = at::arange(capacity_, at::kLong).clamp_max_(std::max(capacity, config_.max_position) - 1);
  const model::Rotary rotary = model_->MakeRotary(positions);
  cos_ = rotary.cos.contiguous();
  sin_ = rotary.sin.contiguous();
  return true;
}

template <typename T>
void CpuForward<T>::CopyPrefix(int64_t from, int64_t to, int64_t length) {
  const int64_t key_cells = (length + kernels::kKeyBlock - 1) / kernels::kKeyBlock * kernels::kKeyBlock;
  for (size_t layer = 0; layer < keys_.size(); ++layer) {
    for (int64_t head = 0; head < m_; ++head) {
      std::copy_n(Keys(layer, from, head), key_cells * d_, Keys(layer, to, head));
      std::copy_n(Values(layer, from, head), length * d_, Values(layer, to, head));
    }
  }
}

template <typename T>
void CpuForward<T>::Lay(const StepBatch& batch) {
  tokens_.clear();
  wanted_.clear();
  int64_t longest = 0;
  for (const Run& run : batch.runs) {
    TORCH_CHECK(run.slot < slots_ && run.start + run.count <= capacity_, "run beyond the cache");
    for (int64_t i = 0; i < run.count; ++i) {
      tokens_.push_back({batch.token_ids.at(tokens_.size()), run.slot, run.start + i});
    }
    longest = std::max(longest, run.start + run.count);
    if (run.wants_logits) wanted_.push_back(Tokens() - 1);
  }
  const size_t rows = tokens_.size(), qkv = static_cast<size_t>((n_ + 2 * m_) * d_);
  const size_t score_floats = static_cast<size_t>(std::min<int64_t>(n_ / m_, 4) * (longest + kernels::kKeyBlock));
  scores_.resize(static_cast<size_t>(all_.size()));
  for (std::vector<float>& scores : scores_) scores.resize(std::max(scores.size(), score_floats));
  qkv_.resize(rows * qkv);
  next_item_ = 0;
  const int64_t weights = config_.hidden_size * (2 * (n_ + m_) * d_ + 3 * config_.intermediate_size);
  team_ = weights * Tokens() < kWorthSharing ? &alone_ : &all_;
}

template <typename T>
at::Tensor CpuForward<T>::Step(const StepBatch& batch) {
  Lay(batch);
  const bool few = batch.kind == StepKind::kAny ? Tokens() <= kFewTokens : batch.kind == StepKind::kDecode;
  return few ? StepFew() : StepMany(batch);
}

template <typename T>
void CpuForward<T>::Prepare(const model::DecoderLayer& layer, size_t index, int64_t t) {
  const Token& token = tokens_[static_cast<size_t>(t)];
  float* row = qkv_.data() + t * (n_ + 2 * m_) * d_;
  const float *cos = Data<float>(cos_) + token.position * d_, *sin = Data<float>(sin_) + token.position * d_;
  const auto eps = static_cast<float>(config_.rms_norm_eps);
  for (int64_t head = 0; head < n_; ++head) {
    kernels::NormAndRotateHead<T>(row + head * d_, Data<T>(layer.q_norm), cos, sin, d_, eps);
  }
  for (int64_t head = 0; head < m_; ++head) {
    float* key = row + (n_ + head) * d_;
    kernels::NormAndRotateHead<T>(key, Data<T>(layer.k_norm), cos, sin, d_, eps);
    kernels::WriteKey<T>(key, Keys(index, token.slot, head), token.position, d_);
    kernels::WriteValue<T>(row + (n_ + m_ + head) * d_, Values(index, token.slot, head), token.position, d_);
  }
}

template <typename T>
void CpuForward<T>::AttendItems(size_t index, T* context, std::vector<float>& scores) {
  const int64_t items = Tokens() * m_, group = n_ / m_;
  const float scale = 1.0f / std::sqrt(static_cast<float>(d_));
  for (int64_t item; (item = next_item_.fetch_add(1, std::memory_order_relaxed)) < items;) {
    const int64_t t = item / m_, head = item % m_;
    const Token& token = tokens_[static_cast<size_t>(t)];
    const int64_t first = config_.sliding_window > 0 ? std::max<int64_t>(0, token.position - config_.sliding_window + 1) : 0;
    kernels::AttendCached<T>({.queries = qkv_.data() + (t * (n_ + 2 * m_) + head * group) * d_,
                              .keys = Keys(index, token.slot, head),
                              .values = Values(index, token.slot, head),
                              .out = context + (t * n_ + head * group) * d_,
                              .scores = scores.data(),
                              .heads = group,
                              .head_dim = d_,
                              .first = first,
                              .last = token.position,
                              .scale = scale});
  }
}

template <typename T>
at::Tensor CpuForward<T>::StepFew() {
  const size_t rows = tokens_.size(), h = static_cast<size_t>(config_.hidden_size);
  const size_t i = static_cast<size_t>(config_.intermediate_size);
  hidden_.resize(rows * h);
  normed_.resize(rows * h);
  context_.resize(rows * static_cast<size_t>(n_ * d_));
  gate_up_.resize(rows * 2 * i);
  product_.resize(rows * i);
  wanted_hidden_.resize(wanted_.size() * h);
  const at::Tensor logits = at::empty({static_cast<int64_t>(wanted_.size()), config_.vocab_size}, at::kFloat);
  team_->Run([&](int member) { Member(member, Data<float>(logits)); });
  return logits;
}

template <typename T>
void CpuForward<T>::Member(int member, float* logits) {
  const int64_t h = config_.hidden_size;
  const Share mine = ShareOf(Tokens(), member, team_->size());
  for (int64_t t = mine.begin; t < mine.end; ++t) {
    kernels::Widen<T>(Data<T>(model_->embed_tokens) + tokens_[static_cast<size_t>(t)].id * h, hidden_.data() + t * h, h);
  }
  for (size_t i = 0; i < model_->layers.size(); ++i) MemberLayer(model_->layers[i], i, member);
  team_->Barrier();
  const int64_t rows = static_cast<int64_t>(wanted_.size());
  const Share share = ShareOf(rows, member, team_->size());
  for (int64_t r = share.begin; r < share.end; ++r) {
    kernels::NormRows<T>(hidden_.data() + wanted_[static_cast<size_t>(r)] * h, Data<T>(model_->final_norm), normed_.data() + r * h,
                         1, h, static_cast<float>(config_.rms_norm_eps));
  }
  team_->Barrier();
  const Share outputs = ShareOf(config_.vocab_size, member, team_->size(), kOutputUnit);
  kernels::Product<T>({normed_.data(), rows, h, Data<T>(model_->lm_head), nullptr, logits, config_.vocab_size, false},
                      outputs.begin, outputs.end);
}

template <typename T>
void CpuForward<T>::MemberLayer(const model::DecoderLayer& layer, size_t index, int member) {
  const int64_t h = config_.hidden_size, width = config_.intermediate_size, qkv = (n_ + 2 * m_) * d_;
  const auto eps = static_cast<float>(config_.rms_norm_eps);
  const Share mine = ShareOf(Tokens(), member, team_->size());
  const auto normalize = [&](const at::Tensor& weight) {
    kernels::NormRows<T>(hidden_.data() + mine.begin * h, Data<T>(weight), normed_.data() + mine.begin * h, mine.end - mine.begin,
                         h, eps);
  };
  team_->Barrier();  // hidden_ is complete
  normalize(layer.input_norm);
  team_->Barrier();
  Multiply(layer.q, normed_.data(), qkv_.data(), qkv, false, member);
  Multiply(layer.k, normed_.data(), qkv_.data() + n_ * d_, qkv, false, member);
  Multiply(layer.v, normed_.data(), qkv_.data() + (n_ + m_) * d_, qkv, false, member);
  if (member == 0) next_item_ = 0;
  team_->Barrier();
  for (int64_t t = mine.begin; t < mine.end; ++t) Prepare(layer, index, t);
  team_->Barrier();
  AttendItems(index, context_.data(), scores_[static_cast<size_t>(member)]);
  team_->Barrier();
  Multiply(layer.o, context_.data(), hidden_.data(), h, true, member);
  team_->Barrier();
  normalize(layer.post_attention_norm);
  team_->Barrier();
  // Gate and up have the same share of outputs, so the activation needs no barrier between.
  Multiply(layer.gate, normed_.data(), gate_up_.data(), 2 * width, false, member);
  Multiply(layer.up, normed_.data(), gate_up_.data() + width, 2 * width, false, member);
  const Share share = ShareOf(width, member, team_->size(), kOutputUnit);
  for (int64_t t = 0; t < Tokens(); ++t) {
    const float* gate = gate_up_.data() + t * 2 * width + share.begin;
    kernels::SiluMulRow<T>(gate, gate + width, product_.data() + t * width + share.begin, share.end - share.begin);
  }
  team_->Barrier();
  Multiply(layer.down, product_.data(), hidden_.data(), h, true, member);
}

template <typename T>
at::Tensor CpuForward<T>::StepMany(const StepBatch& batch) {
  const int64_t tokens = Tokens(), columns = (n_ + 2 * m_) * d_;
  at::Tensor hidden = model_->Embed(at::tensor(batch.token_ids, at::kLong));
  for (size_t i = 0; i < model_->layers.size(); ++i) {
    const model::DecoderLayer& layer = model_->layers[i];
    const at::Tensor qkv = model::Project(model_->Normalize(hidden, layer.input_norm), {&layer.q, &layer.k, &layer.v});
    const at::Tensor context = at::empty({tokens, n_ * d_}, qkv.options());
    next_item_ = 0;
    team_->Run([&](int member) {
      const Share mine = ShareOf(tokens, member, team_->size());
      for (int64_t t = mine.begin; t < mine.end; ++t) {
        kernels::Widen<T>(Data<T>(qkv) + t * columns, qkv_.data() + t * columns, columns);
        Prepare(layer, i, t);
      }
      team_->Barrier();
      AttendItems(i, Data<T>(context), scores_[static_cast<size_t>(member)]);
    });
    const at::Tensor middle = hidden + layer.o(context);
    const at::Tensor gate_up = model::Project(model_->Normalize(middle, layer.post_attention_norm), {&layer.gate, &layer.up});
    hidden = middle + layer.down(model::SiluMul(gate_up));
  }
  const at::Tensor last = hidden.index_select(0, at::tensor(wanted_, at::kLong));
  return model_->Logits(model_->Normalize(last, model_->final_norm)).to(at::kFloat).contiguous();
}

}  // namespace

std::unique_ptr<Forward> MakeCpuForward(std::shared_ptr<const model::CausalLm> model) {
  TORCH_CHECK(model::TakesCpuKernels(model->embed_tokens), "the CPU kernels take float32 and bfloat16 models on the CPU");
  if (model->dtype() == at::kBFloat16) return std::make_unique<CpuForward<Bf16>>(std::move(model));
  return std::make_unique<CpuForward<float>>(std::move(model));
}

}  // namespace refinery::generate
