// Cached attention in plain ATen operators, for any device and dtype.

#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <algorithm>

#include "worker/task/generate/forward.h"
#include "worker/task/model/ops.h"
#include "worker/task/model/projection.h"

namespace refinery::generate {
namespace {

class AtenForward final : public Forward {
 public:
  explicit AtenForward(std::shared_ptr<const model::CausalLm> model) : model_(std::move(model)) {}

  bool Reserve(int64_t slots, int64_t capacity) override {
    if (slots <= slots_ && capacity <= capacity_) return false;
    slots_ = std::max(slots, slots_);
    capacity_ = std::max(capacity, capacity_);
    const model::ModelConfig& c = model_->config();
    for (std::vector<at::Tensor>* cache : {&keys_, &values_}) {
      cache->clear();
      for (int64_t i = 0; i < c.num_layers; ++i) {
        cache->push_back(at::zeros({slots_, capacity_, c.num_kv_heads * c.head_dim}, model_->embed_tokens.options()));
      }
    }
    return true;
  }

  void Release() override {
    keys_.clear();
    values_.clear();
    slots_ = capacity_ = 0;
  }

  int64_t CacheBytes(int64_t slots, int64_t capacity) const override {
    const model::ModelConfig& c = model_->config();
    return 2 * slots * capacity * c.num_layers * c.num_kv_heads * c.head_dim * model_->embed_tokens.element_size();
  }

  // The libraries below choose their kernels by the number of rows.
  bool RowInvariant(StepKind) const override { return false; }

  void CopyPrefix(int64_t from, int64_t to, int64_t length) override {
    for (const std::vector<at::Tensor>* cache : {&keys_, &values_}) {
      for (const at::Tensor& layer : *cache) layer[to].narrow(0, 0, length).copy_(layer[from].narrow(0, 0, length));
    }
  }

  at::Tensor Step(const StepBatch& batch) override {
    const at::Device device = model_->device();
    std::vector<int64_t> positions, cells, wanted;
    int64_t tokens = 0;
    for (const Run& run : batch.runs) {
      TORCH_CHECK(run.slot < slots_ && run.start + run.count <= capacity_, "run beyond the cache");
      for (int64_t i = 0; i < run.count; ++i) {
        positions.push_back(run.start + i);
        cells.push_back(run.slot * capacity_ + run.start + i);
      }
      tokens += run.count;
      if (run.wants_logits) wanted.push_back(tokens - 1);
    }
    const auto on_device = [&](const std::vector<int64_t>& list) { return at::tensor(list, at::kLong).to(device); };
    const model::Rotary rotary = model_->MakeRotary(on_device(positions));
    const at::Tensor cell_index = on_device(cells);
    at::Tensor hidden = model_->Embed(on_device(batch.token_ids));
    for (size_t i = 0; i < model_->layers.size(); ++i) hidden = Layer(i, hidden, batch.runs, cell_index, rotary);
    hidden = model_->Normalize(hidden.index_select(0, on_device(wanted)), model_->final_norm);
    return model_->Logits(hidden).to(at::kCPU, at::kFloat).contiguous();
  }

 private:
  at::Tensor Layer(size_t index, const at::Tensor& hidden, const std::vector<Run>& runs, const at::Tensor& cells,
                   const model::Rotary& rotary) const {
    const model::ModelConfig& c = model_->config();
    const model::DecoderLayer& layer = model_->layers[index];
    const int64_t n = c.num_heads, m = c.num_kv_heads, d = c.head_dim, tokens = hidden.size(0);
    const at::Tensor qkv = model::Project(model_->Normalize(hidden, layer.input_norm), {&layer.q, &layer.k, &layer.v});
    at::Tensor q = qkv.narrow(1, 0, n * d), k = qkv.narrow(1, n * d, m * d);
    if (c.qk_norm) {
      q = model_->Normalize(q.reshape({tokens, n, d}), layer.q_norm).view({tokens, n * d});
      k = model_->Normalize(k.reshape({tokens, m, d}), layer.k_norm).view({tokens, m * d});
    }
    q = model::Rotated(q, rotary.cos, rotary.sin, d);
    keys_[index].view({-1, m * d}).index_copy_(0, cells, model::Rotated(k, rotary.cos, rotary.sin, d));
    values_[index].view({-1, m * d}).index_copy_(0, cells, qkv.narrow(1, (n + m) * d, m * d));
    const at::Tensor middle = hidden + layer.o(Attend(index, q, runs));
    const at::Tensor gate_up = model::Project(model_->Normalize(middle, layer.post_attention_norm), {&layer.gate, &layer.up});
    return middle + layer.down(model::SiluMul(gate_up));
  }

  // Runs of one token each go together, padded to the longest cache; longer runs one by one.
  at::Tensor Attend(size_t index, const at::Tensor& q, const std::vector<Run>& runs) const {
    const model::ModelConfig& c = model_->config();
    const at::Tensor out = at::empty_like(q);
    std::vector<int64_t> rows, slots, ends;
    int64_t row = 0, longest = 0;
    for (const Run& run : runs) {
      if (run.count == 1) {
        rows.push_back(row);
        slots.push_back(run.slot);
        ends.push_back(run.start + 1);
        longest = std::max(longest, run.start + 1);
      } else {
        const at::Tensor query_position = at::arange(run.start, run.start + run.count, q.options().dtype(at::kLong));
        const at::Tensor context = Sdpa(index, q.narrow(0, row, run.count).view({1, run.count, c.num_heads, c.head_dim}),
                                        at::tensor({run.slot}, at::kLong).to(q.device()), query_position.unsqueeze(0),
                                        run.start + run.count);
        out.narrow(0, row, run.count).copy_(context.view({run.count, -1}));
      }
      row += run.count;
    }
    if (rows.empty()) return out;
    const at::Tensor row_index = at::tensor(rows, at::kLong).to(q.device());
    const int64_t count = static_cast<int64_t>(rows.size());
    const at::Tensor query_position = at::tensor(ends, at::kLong).to(q.device()).sub(1).view({count, 1});
    const at::Tensor context = Sdpa(index, q.index_select(0, row_index).view({count, 1, c.num_heads, c.head_dim}),
                                    at::tensor(slots, at::kLong).to(q.device()), query_position, longest);
    return out.index_copy_(0, row_index, context.view({count, -1}));
  }

  // q [B, L, n, d] at positions [B, L] against the first `length` cells of each slot -> [B, L, n, d].
  at::Tensor Sdpa(size_t index, const at::Tensor& q, const at::Tensor& slots, const at::Tensor& query_position,
                  int64_t length) const {
    const model::ModelConfig& c = model_->config();
    const auto heads = [&](const at::Tensor& cache) {
      return cache.narrow(1, 0, length).index_select(0, slots).view({q.size(0), length, c.num_kv_heads, c.head_dim}).transpose(1, 2);
    };
    const at::Tensor age = query_position.unsqueeze(2) - at::arange(length, query_position.options());
    at::Tensor visible = age >= 0;
    if (const int64_t window = model_->layers[index].sliding_window; window > 0) visible = visible.logical_and(age < window);
    return at::scaled_dot_product_attention(q.transpose(1, 2), heads(keys_[index]), heads(values_[index]), visible.unsqueeze(1),
                                            0.0, false, c10::nullopt, c.num_heads != c.num_kv_heads)
        .transpose(1, 2)
        .contiguous();
  }

  const std::shared_ptr<const model::CausalLm> model_;
  int64_t slots_ = 0, capacity_ = 0;
  std::vector<at::Tensor> keys_, values_;  // per layer [slots, capacity, m * d]
};

}  // namespace

std::unique_ptr<Forward> MakeAtenForward(std::shared_ptr<const model::CausalLm> model) {
  return std::make_unique<AtenForward>(std::move(model));
}

std::unique_ptr<Forward> MakeForward(std::shared_ptr<const model::CausalLm> model) {
  bool plain = model::TakesCpuKernels(model->embed_tokens);
  for (const model::DecoderLayer& layer : model->layers) {
    for (const model::Linear* linear : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
      const bool ours = linear->packed != nullptr
                            ? model->dtype() == at::kBFloat16
                            : linear->weight.scalar_type() == model->dtype() && linear->weight.is_contiguous();
      plain = plain && !linear->lora_a.defined() && ours;
    }
  }
  return plain ? MakeCpuForward(std::move(model)) : MakeAtenForward(std::move(model));
}

}  // namespace refinery::generate
