// The cache, prompts, and attention for prompts and decoding alike.

#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <algorithm>
#include <cmath>

#include "worker/task/generate/cpu_forward.h"
#include "worker/task/generate/cpu_kernels.h"
#include "worker/task/model/ops.h"
#include "worker/task/model/projection.h"

namespace refinery::generate {

namespace {

constexpr int64_t kFewTokens = 32;      // up to here our products beat ATen's
// Products (weights x tokens) of one layer below which barriers cost more than a second thread brings.
constexpr int64_t kWorthSharing = 400000;

}  // namespace

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
  const int64_t value_cells = paired_ ? (length + 1) / 2 * 2 : length;
  for (size_t layer = 0; layer < keys_.size(); ++layer) {
    for (int64_t head = 0; head < m_; ++head) {
      std::copy_n(Keys(layer, from, head), key_cells * d_, Keys(layer, to, head));
      std::copy_n(Values(layer, from, head), value_cells * d_, Values(layer, to, head));
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
  const size_t score_floats = static_cast<size_t>(paired_ ? kernels::PairScratchFloats(longest, d_)
                                                          : std::min<int64_t>(n_ / m_, 4) * (longest + kernels::kKeyBlock));
  scores_.resize(static_cast<size_t>(all_.size()));
  for (AlignedVector<float>& scores : scores_) scores.resize(std::max(scores.size(), score_floats));
  qkv_.resize(rows * qkv);
  if (paired_) LayTiles(batch);
  lone_ = !paired_ || n_ / m_ <= kernels::kPairQueries;
  for (const Run& run : batch.runs) lone_ = lone_ && run.count == 1;
  for (std::atomic<int64_t>& turns : turns_) turns.store(0);
  const int64_t weights = config_.hidden_size * (2 * (n_ + m_) * d_ + 3 * config_.intermediate_size);
  team_ = weights * Tokens() < kWorthSharing ? &alone_ : &all_;
}

template <typename T>
void CpuForward<T>::LayTiles(const StepBatch& batch) {
  tiles_.clear();
  const int64_t group = n_ / m_;
  int64_t token = 0;
  for (const Run& run : batch.runs) {
    // The last queries see most: they go first, so that no member ends up alone with a long one.
    const int64_t rows = run.count * group, pieces = (rows + kernels::kPairQueries - 1) / kernels::kPairQueries;
    for (int64_t piece = pieces - 1; piece >= 0; --piece) {
      const int64_t row = piece * kernels::kPairQueries;
      for (int64_t head = 0; head < m_; ++head) {
        tiles_.push_back({head, token * group + row, std::min<int64_t>(kernels::kPairQueries, rows - row)});
      }
    }
    token += run.count;
  }
}

template <typename T>
at::Tensor CpuForward<T>::Step(const StepBatch& batch) {
  Lay(batch);
  const bool few = batch.kind == StepKind::kAny ? Tokens() <= kFewTokens : batch.kind == StepKind::kDecode;
  return few ? StepFew() : StepMany(batch);
}

template <typename T>
Share CpuForward<T>::PrepareShare(int member) const {
  const auto whole_pairs = [&](int64_t border) {
    if (border <= 0 || border >= Tokens()) return border;
    const Token &before = tokens_[static_cast<size_t>(border - 1)], &after = tokens_[static_cast<size_t>(border)];
    return after.slot == before.slot && after.position % 2 == 1 ? border + 1 : border;
  };
  const Share share = ShareOf(Tokens(), member, team_->size());
  return {whole_pairs(share.begin), whole_pairs(share.end)};
}

template <typename T>
void CpuForward<T>::PrepareHead(const model::DecoderLayer& layer, size_t index, int64_t t, int64_t head) {
  const Token& token = tokens_[static_cast<size_t>(t)];
  const int64_t group = n_ / m_;
  float* row = qkv_.data() + t * (n_ + 2 * m_) * d_;
  const float *cos = Data<float>(cos_) + token.position * d_, *sin = Data<float>(sin_) + token.position * d_;
  const auto eps = static_cast<float>(config_.rms_norm_eps);
  for (int64_t query = head * group; query < (head + 1) * group; ++query) {
    kernels::NormAndRotateHead<T>(row + query * d_, Data<T>(layer.q_norm), cos, sin, d_, eps);
  }
  float* key = row + (n_ + head) * d_;
  const float* value = row + (n_ + m_ + head) * d_;
  kernels::NormAndRotateHead<T>(key, Data<T>(layer.k_norm), cos, sin, d_, eps);
  if constexpr (std::is_same_v<T, Bf16>) {
    if (paired_) {
      kernels::WritePairKey(key, Keys(index, token.slot, head), token.position, d_);
      kernels::WritePairValue(value, Values(index, token.slot, head), token.position, d_);
      return;
    }
  }
  kernels::WriteKey<T>(key, Keys(index, token.slot, head), token.position, d_);
  kernels::WriteValue<T>(value, Values(index, token.slot, head), token.position, d_);
}

template <typename T>
void CpuForward<T>::AttendTiles(size_t index, T* context, AlignedVector<float>& scores, int64_t turn) {
  if constexpr (std::is_same_v<T, Bf16>) {
    const int64_t tiles = static_cast<int64_t>(tiles_.size()), group = n_ / m_;
    kernels::PairAttentionItem item{.scratch = scores.data(),
                                    .head_dim = d_,
                                    .scale = 1.0f / std::sqrt(static_cast<float>(d_))};
    for (std::atomic<int64_t>& turns = turns_[index]; turn < tiles; turn = turns.fetch_add(1)) {
      const Tile& tile = tiles_[static_cast<size_t>(turn)];
      if (lone_) PrepareHead(model_->layers[index], index, tile.first / group, tile.head);
      const int64_t slot = tokens_[static_cast<size_t>(tile.first / group)].slot;
      item.keys = Keys(index, slot, tile.head);
      item.values = Values(index, slot, tile.head);
      item.count = static_cast<int>(tile.count);
      for (int64_t i = 0; i < tile.count; ++i) {
        const int64_t t = (tile.first + i) / group, head = tile.head * group + (tile.first + i) % group;
        const int64_t position = tokens_[static_cast<size_t>(t)].position;
        item.queries[i] = {qkv_.data() + (t * (n_ + 2 * m_) + head) * d_, context + (t * n_ + head) * d_, FirstSeen(index, position),
                           position};
      }
      kernels::AttendPairs(item);
    }
  }
}

template <typename T>
void CpuForward<T>::AttendItems(size_t index, T* context, AlignedVector<float>& scores, int64_t turn) {
  if (paired_) return AttendTiles(index, context, scores, turn);
  const int64_t items = Tokens() * m_, group = n_ / m_;
  const float scale = 1.0f / std::sqrt(static_cast<float>(d_));
  for (std::atomic<int64_t>& turns = turns_[index]; turn < items; turn = turns.fetch_add(1)) {
    const int64_t t = turn / m_, head = turn % m_;
    if (lone_) PrepareHead(model_->layers[index], index, t, head);
    const Token& token = tokens_[static_cast<size_t>(t)];
    const int64_t first = FirstSeen(index, token.position);
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
at::Tensor CpuForward<T>::StepMany(const StepBatch& batch) {
  const int64_t tokens = Tokens(), columns = (n_ + 2 * m_) * d_;
  at::Tensor hidden = model_->Embed(at::tensor(batch.token_ids, at::kLong));
  for (size_t i = 0; i < model_->layers.size(); ++i) {
    const model::DecoderLayer& layer = model_->layers[i];
    const at::Tensor qkv = model::Project(model_->Normalize(hidden, layer.input_norm), {&layer.q, &layer.k, &layer.v});
    const at::Tensor context = at::empty({tokens, n_ * d_}, qkv.options());
    team_->Run([&](int member) {
      const Share mine = PrepareShare(member);
      for (int64_t t = mine.begin; t < mine.end; ++t) {
        kernels::Widen<T>(Data<T>(qkv) + t * columns, qkv_.data() + t * columns, columns);
        if (!lone_) Prepare(layer, i, t);
      }
      team_->Barrier();
      AttendItems(i, Data<T>(context), scores_[static_cast<size_t>(member)], turns_[i].fetch_add(1));
    });
    const at::Tensor middle = model::ProjectOnto(hidden, context, layer.o);
    hidden = model::ProjectOnto(
        middle, model::ProjectGated(model_->Normalize(middle, layer.post_attention_norm), layer.gate, layer.up), layer.down);
  }
  const at::Tensor last = hidden.index_select(0, at::tensor(wanted_, at::kLong));
  return model_->Logits(model_->Normalize(last, model_->final_norm)).to(at::kFloat).contiguous();
}

template class CpuForward<float>;
template class CpuForward<Bf16>;

std::unique_ptr<Forward> MakeCpuForward(std::shared_ptr<const model::CausalLm> model) {
  TORCH_CHECK(model::TakesCpuKernels(model->embed_tokens), "the CPU kernels take float32 and bfloat16 models on the CPU");
  if (model->dtype() == at::kBFloat16) return std::make_unique<CpuForward<Bf16>>(std::move(model));
  return std::make_unique<CpuForward<float>>(std::move(model));
}

}  // namespace refinery::generate
