#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <span>

#include "worker/task/model/causal_lm.h"
#include "worker/task/model/matmul.h"
#include "worker/task/model/ops.h"
#include "worker/task/model/projection.h"
#include "worker/task/model/rope.h"

namespace refinery::model {

at::Tensor Linear::operator()(const at::Tensor& x) const {
  if (x.dim() == 2) return Project(x, {this});
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = outputs();
  return Project(x.reshape({-1, x.size(-1)}), {this}).view(shape);
}

std::vector<Linear*> DecoderLayer::Linears() { return {&q, &k, &v, &o, &gate, &up, &down}; }

at::Tensor CausalLm::Embed(const at::Tensor& token_ids) const {
  TORCH_CHECK(token_ids.dim() == 1 && token_ids.scalar_type() == at::kLong, "Embed: token_ids ", token_ids.sizes());
  return embed_tokens.index_select(0, token_ids);
}

Rotary CausalLm::Turned(const at::Tensor& positions, const at::Tensor& frequencies) const {
  const at::Tensor angles = positions.to(at::kFloat).unsqueeze(1) * frequencies;
  const at::Tensor both = at::cat({angles, angles}, 1);
  if (attention_scaling_ == 1) return {both.cos(), both.sin()};
  return {both.cos().mul_(attention_scaling_), both.sin().mul_(attention_scaling_)};
}

Rotary CausalLm::MakeRotary(const at::Tensor& positions) const {
  if (config_.rope_scaling.type != "dynamic") return Turned(positions, inverse_frequencies_);
  const at::Tensor on_cpu = positions.to(at::kCPU).contiguous();
  std::vector<at::Tensor> rows;
  for (const int64_t position : std::span(on_cpu.data_ptr<int64_t>(), static_cast<size_t>(on_cpu.numel()))) {
    rows.push_back(position < config_.max_position ? inverse_frequencies_
                                                   : DynamicFrequencies(config_, position + 1).to(device()));
  }
  return rows.empty() ? Turned(positions, inverse_frequencies_) : Turned(positions, at::stack(rows));
}

Rotary CausalLm::MakeRotary(const std::vector<int64_t>& lengths) const {
  const bool dynamic = config_.rope_scaling.type == "dynamic";
  std::vector<int64_t> positions;
  std::vector<at::Tensor> rows;  // frequencies of each sequence, for dynamic scaling
  bool stretched = false;
  for (int64_t length : lengths) {
    for (int64_t p = 0; p < length; ++p) positions.push_back(p);
    if (!dynamic) continue;
    const bool beyond = length > config_.max_position;
    stretched = stretched || beyond;
    rows.push_back((beyond ? DynamicFrequencies(config_, length).to(device()) : inverse_frequencies_).expand({length, -1}));
  }
  const at::Tensor where = at::tensor(positions, at::kLong).to(device());
  return Turned(where, stretched ? at::cat(rows) : inverse_frequencies_);
}

at::Tensor CausalLm::Normalize(const at::Tensor& x, const at::Tensor& weight) const {
  return RmsNorm(x, weight, config_.rms_norm_eps);
}

namespace {

// qkv with the heads' norms of Qwen3 applied to q and k.
at::Tensor NormalizeHeads(const CausalLm& model, const DecoderLayer& layer, const at::Tensor& q, const at::Tensor& k,
                          const at::Tensor& v) {
  const int64_t tokens = q.size(0), d = model.config().head_dim;
  const auto normalized = [&](const at::Tensor& x, const at::Tensor& weight) {
    return model.Normalize(x.reshape({tokens, -1, d}), weight).view({tokens, -1});
  };
  return at::cat({normalized(q, layer.q_norm), normalized(k, layer.k_norm), v}, 1);
}

AttentionShape ShapeOf(const ModelConfig& config, const DecoderLayer& layer) {
  return {config.num_heads, config.num_kv_heads, config.head_dim, layer.sliding_window};
}

}  // namespace

at::Tensor CausalLm::Attend(const DecoderLayer& layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const std::vector<int64_t>& lengths, const Rotary& rotary) const {
  const at::Tensor qkv = config_.qk_norm ? NormalizeHeads(*this, layer, q, k, v) : at::cat({q, k, v}, 1);
  return PackedAttention(qkv, rotary.cos, rotary.sin, lengths, ShapeOf(config_, layer));
}

at::Tensor CausalLm::ForwardLayer(const DecoderLayer& layer, const at::Tensor& hidden, const std::vector<int64_t>& lengths,
                                  const Rotary& rotary) const {
  at::Tensor qkv = Project(Normalize(hidden, layer.input_norm), {&layer.q, &layer.k, &layer.v});
  if (config_.qk_norm) {
    const std::vector<at::Tensor> parts =
        qkv.split_with_sizes({layer.q.outputs(), layer.k.outputs(), layer.v.outputs()}, 1);
    qkv = NormalizeHeads(*this, layer, parts[0], parts[1], parts[2]);
  }
  const at::Tensor context = PackedAttention(qkv, rotary.cos, rotary.sin, lengths, ShapeOf(config_, layer));
  const at::Tensor middle = ProjectOnto(hidden, context, layer.o);
  return ProjectOnto(middle, ProjectGated(Normalize(middle, layer.post_attention_norm), layer.gate, layer.up), layer.down);
}

at::Tensor CausalLm::Hidden(const PackedBatch& batch, std::vector<at::Tensor>* outputs) const {
  const Rotary rotary = MakeRotary(batch.lengths);
  TORCH_CHECK(rotary.cos.size(0) == batch.token_ids.size(0), "Hidden: ", batch.token_ids.size(0),
              " tokens, but lengths sum to ", rotary.cos.size(0));
  at::Tensor hidden = Embed(batch.token_ids.to(device()));
  for (const DecoderLayer& layer : layers) {
    hidden = ForwardLayer(layer, hidden, batch.lengths, rotary);
    if (outputs != nullptr) outputs->push_back(hidden);
  }
  return Normalize(hidden, final_norm);
}

at::Tensor CausalLm::Logits(const at::Tensor& hidden) const {
  return hidden.dim() == 2 ? Matmul(hidden, lm_head, {}) : at::linear(hidden, lm_head);
}

Linear* CausalLm::FindLinear(const std::string& name) {
  for (DecoderLayer& layer : layers) {
    for (Linear* linear : layer.Linears()) {
      if (linear->name == name) return linear;
    }
  }
  return nullptr;
}

const Linear* CausalLm::FindLinear(const std::string& name) const { return const_cast<CausalLm*>(this)->FindLinear(name); }

}  // namespace refinery::model
