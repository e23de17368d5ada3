// Decoding: the pass of a few tokens over all layers as one region of a Team. Each member reads one stretch of every weight: in
// smaller pieces, taken in turns, the memory's prefetching reaches two thirds of the bandwidth (measured).

#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <algorithm>

#include "worker/task/generate/cpu_forward.h"
#include "worker/task/generate/cpu_kernels.h"
#include "worker/task/generate/cpu_product.h"
#include "worker/task/generate/packed_product.h"
#include "worker/task/model/packed_weight.h"

namespace refinery::generate {
namespace {

constexpr int64_t kUnit = 16;              // outputs are shared out in multiples of it: whole cache lines
constexpr int64_t kAheadBytes = 16 << 10;  // of the next phase's weights that are asked for before a wait

// Asks for the first bytes of a weight's rows from `row` on.
void Prefetch(const model::Linear& linear, int64_t row) {
  const at::Tensor& rows = linear.packed != nullptr ? linear.packed->codes : linear.weight;
  const int64_t stride = rows.size(1) * static_cast<int64_t>(rows.element_size());
  const char* from = static_cast<const char*>(rows.const_data_ptr()) + row * stride;
  const int64_t bytes = std::min(kAheadBytes, (rows.size(0) - row) * stride);
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(from + b);
}

}  // namespace

template <typename T>
void CpuForward<T>::Multiply(const model::Linear& linear, const T* x, float* y, int64_t y_stride, bool accumulate, int64_t begin,
                             int64_t end) const {
  if constexpr (std::is_same_v<T, Bf16>) {
    if (const model::PackedWeight* packed = linear.packed.get(); packed != nullptr) {
      const kernels::PackedMatrix weight{.codes = packed->codes.const_data_ptr<uint8_t>(),
                                         .scales = static_cast<const uint16_t*>(packed->scales.const_data_ptr()),
                                         .offsets = Data<float>(packed->offsets),
                                         .inputs = packed->inputs,
                                         .group_size = packed->group_size,
                                         .planes = static_cast<int>(packed->planes()),
                                         .bits = static_cast<int>(packed->bits)};
      return kernels::PackedProduct({x, Tokens(), weight, Data<T>(linear.bias), y, y_stride, accumulate}, begin, end);
    }
  }
  kernels::Product<T>({x, Tokens(), linear.weight.size(1), Data<T>(linear.weight), Data<T>(linear.bias), y, y_stride, accumulate},
                      begin, end);
}

// Outputs [begin, end) of q, k and v side by side.
template <typename T>
void CpuForward<T>::MultiplyQkv(const model::DecoderLayer& layer, const T* x, int64_t begin, int64_t end) {
  const int64_t stride = (n_ + 2 * m_) * d_;
  int64_t column = 0;
  for (const model::Linear* linear : {&layer.q, &layer.k, &layer.v}) {
    const int64_t outputs = linear->outputs(), from = std::max<int64_t>(begin - column, 0), to = std::min(end - column, outputs);
    if (from < to) Multiply(*linear, x, qkv_.data() + column, stride, false, from, to);
    column += outputs;
  }
}

template <typename T>
Share CpuForward<T>::Meet(int member, std::initializer_list<const model::Linear*> layers) {
  int64_t outputs = 0;
  for (const model::Linear* linear : layers) outputs += linear->outputs();
  const Share share = ShareOf(outputs, member, team_->size(), kUnit);
  int64_t row = share.begin;
  for (const model::Linear* linear : layers) {
    if (row < linear->outputs()) {
      Prefetch(*linear, row);
      break;
    }
    row -= linear->outputs();
  }
  team_->Barrier();
  return share;
}

template <typename T>
void CpuForward<T>::NormalizeAll(const at::Tensor& weight, int member) {
  kernels::NormRows<T>(hidden_.data(), Data<T>(weight), normed_[static_cast<size_t>(member)].data(), Tokens(), config_.hidden_size,
                       static_cast<float>(config_.rms_norm_eps));
}

template <typename T>
at::Tensor CpuForward<T>::StepFew() {
  const size_t rows = tokens_.size(), h = static_cast<size_t>(config_.hidden_size);
  const size_t i = static_cast<size_t>(config_.intermediate_size);
  hidden_.resize(rows * h);
  normed_.resize(static_cast<size_t>(all_.size()));
  for (AlignedVector<T>& normed : normed_) normed.resize(rows * h);
  context_.resize(rows * static_cast<size_t>(n_ * d_));
  gate_up_.resize(rows * 2 * i);
  product_.resize(rows * i);
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
  for (size_t i = 0; i < model_->layers.size(); ++i) MemberLayer(i, member);
  Head(member, logits);
}

template <typename T>
void CpuForward<T>::MemberLayer(size_t index, int member) {
  const model::DecoderLayer& layer = model_->layers[index];
  const int64_t h = config_.hidden_size, width = config_.intermediate_size;
  const T* normed = normed_[static_cast<size_t>(member)].data();
  AlignedVector<float>& scores = scores_[static_cast<size_t>(member)];

  Share share = Meet(member, {&layer.q, &layer.k, &layer.v});  // hidden_ is complete
  NormalizeAll(layer.input_norm, member);
  MultiplyQkv(layer, normed, share.begin, share.end);
  team_->Barrier();
  if (!lone_) {
    const Share mine = PrepareShare(member);
    for (int64_t t = mine.begin; t < mine.end; ++t) Prepare(layer, index, t);
    team_->Barrier();
  }
  AttendItems(index, context_.data(), scores, turns_[index].fetch_add(1));
  share = Meet(member, {&layer.o});
  Multiply(layer.o, context_.data(), hidden_.data(), h, true, share.begin, share.end);
  share = Meet(member, {&layer.gate});
  NormalizeAll(layer.post_attention_norm, member);
  // The same outputs of gate and up, so that the activation needs no wait between.
  Multiply(layer.gate, normed, gate_up_.data(), 2 * width, false, share.begin, share.end);
  Multiply(layer.up, normed, gate_up_.data() + width, 2 * width, false, share.begin, share.end);
  for (int64_t t = 0; t < Tokens(); ++t) {
    const float* gate = gate_up_.data() + t * 2 * width + share.begin;
    kernels::SiluMulRow<T>(gate, gate + width, product_.data() + t * width + share.begin, share.end - share.begin);
  }
  share = Meet(member, {&layer.down});
  Multiply(layer.down, product_.data(), hidden_.data(), h, true, share.begin, share.end);
}

template <typename T>
void CpuForward<T>::Head(int member, float* logits) {
  const int64_t h = config_.hidden_size, rows = static_cast<int64_t>(wanted_.size()), vocab = config_.vocab_size;
  team_->Barrier();
  T* normed = normed_[static_cast<size_t>(member)].data();
  for (int64_t r = 0; r < rows; ++r) {
    kernels::NormRows<T>(hidden_.data() + wanted_[static_cast<size_t>(r)] * h, Data<T>(model_->final_norm), normed + r * h, 1, h,
                         static_cast<float>(config_.rms_norm_eps));
  }
  const Share share = ShareOf(vocab, member, team_->size(), kUnit);
  kernels::Product<T>({normed, rows, h, Data<T>(model_->lm_head), nullptr, logits, vocab, false}, share.begin, share.end);
}

#define RF_INSTANTIATE(T)                                                                                                   \
  template at::Tensor CpuForward<T>::StepFew();                                                                             \
  template void CpuForward<T>::Member(int, float*);                                                                         \
  template void CpuForward<T>::MemberLayer(size_t, int);                                                                    \
  template void CpuForward<T>::Head(int, float*);                                                                           \
  template void CpuForward<T>::NormalizeAll(const at::Tensor&, int);                                                        \
  template Share CpuForward<T>::Meet(int, std::initializer_list<const model::Linear*>);                                     \
  template void CpuForward<T>::Multiply(const model::Linear&, const T*, float*, int64_t, bool, int64_t, int64_t) const;     \
  template void CpuForward<T>::MultiplyQkv(const model::DecoderLayer&, const T*, int64_t, int64_t);
RF_INSTANTIATE(float)
RF_INSTANTIATE(Bf16)

}  // namespace refinery::generate
