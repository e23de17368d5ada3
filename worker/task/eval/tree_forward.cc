#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <algorithm>
#include <map>

#include "worker/task/eval/tree_forward.h"
#include "worker/task/model/ops.h"
#include "worker/task/model/projection.h"

namespace refinery::eval {
namespace {

// 0 where a node attends (itself and its ancestors inside the sliding window), -inf elsewhere; undefined for plain chains.
at::Tensor BlockMask(const TreeBlock& block, const int64_t* positions, int64_t window, at::ScalarType dtype) {
  const int64_t n = static_cast<int64_t>(block.parents.size());
  if (block.chain && (window <= 0 || n <= window)) return {};
  at::Tensor mask = at::full({n, n}, -std::numeric_limits<float>::infinity(), at::kFloat);
  float* values = mask.data_ptr<float>();
  for (int64_t node = 0; node < n; ++node) {
    for (int64_t at = node; at >= 0; at = block.parents[static_cast<size_t>(at)]) {
      if (window > 0 && positions[node] - positions[at] >= window) break;
      values[node * n + at] = 0;
    }
  }
  return mask.to(dtype);
}

class TreePass {
 public:
  TreePass(const model::CausalLm& model, const TreeBatch& batch) : model_(model), batch_(batch) {
    for (const model::DecoderLayer& layer : model.layers) {
      std::vector<at::Tensor>& masks = masks_[layer.sliding_window];   // layers may differ (Qwen2, Qwen3)
      if (!masks.empty()) continue;
      for (const TreeBlock& block : batch.blocks) {
        const at::Tensor mask =
            BlockMask(block, batch.positions.data() + block.begin, layer.sliding_window, model.dtype());
        masks.push_back(mask.defined() ? mask.to(model.device()) : mask);
      }
    }
    // As of whole sequences, not of tokens decoded one after the other.
    const int64_t depth = *std::max_element(batch.positions.begin(), batch.positions.end()) + 1;
    const model::Rotary rows = model.MakeRotary(std::vector<int64_t>{depth});
    const at::Tensor positions = at::tensor(batch.positions, at::kLong).to(model.device());
    rotary_ = {rows.cos.index_select(0, positions), rows.sin.index_select(0, positions)};
  }

  // Of the nodes `wanted` alone, in their order: the last layer's other nodes only lend their keys and values.
  at::Tensor Hidden(const at::Tensor& wanted) const {
    at::Tensor hidden = model_.Embed(at::tensor(batch_.token_ids, at::kLong).to(model_.device()));
    for (size_t i = 0; i < model_.layers.size(); ++i) {
      const model::DecoderLayer& layer = model_.layers[i];
      at::Tensor context = Attention(layer, model_.Normalize(hidden, layer.input_norm));
      if (i + 1 == model_.layers.size()) {
        context = context.index_select(0, wanted);
        hidden = hidden.index_select(0, wanted);
      }
      const at::Tensor middle = layer.o(context).add_(hidden);
      const at::Tensor gate_up =
          model::Project(model_.Normalize(middle, layer.post_attention_norm), {&layer.gate, &layer.up});
      hidden = layer.down(model::SiluMul(gate_up)).add_(middle);
    }
    return model_.Normalize(hidden, model_.final_norm);
  }

 private:
  // [N, h*d] -> [1, h, N, d] as SDPA wants it.
  at::Tensor Heads(const at::Tensor& x) const {
    return x.view({x.size(0), -1, model_.config().head_dim}).transpose(0, 1).unsqueeze(0);
  }

  // Heads' norm (Qwen3) and rotary embedding.
  at::Tensor Positioned(at::Tensor x, const at::Tensor& norm) const {
    const int64_t d = model_.config().head_dim;
    if (model_.config().qk_norm) x = model_.Normalize(x.reshape({x.size(0), -1, d}), norm).view({x.size(0), -1});
    return model::Rotated(x.contiguous(), rotary_.cos, rotary_.sin, d);
  }

  at::Tensor Attention(const model::DecoderLayer& layer, const at::Tensor& x) const {
    const int64_t d = model_.config().head_dim, heads = model_.config().num_heads * d, shared = model_.config().num_kv_heads * d;
    const int64_t groups = model_.config().num_heads / model_.config().num_kv_heads;
    const at::Tensor qkv = model::Project(x, {&layer.q, &layer.k, &layer.v});
    const at::Tensor q = Heads(Positioned(qkv.narrow(1, 0, heads), layer.q_norm));
    const at::Tensor k = Heads(Positioned(qkv.narrow(1, heads, shared), layer.k_norm)).repeat_interleave(groups, 1);
    const at::Tensor v = Heads(qkv.narrow(1, heads + shared, shared)).repeat_interleave(groups, 1);
    const std::vector<at::Tensor>& masks = masks_.at(layer.sliding_window);
    std::vector<at::Tensor> contexts;
    for (size_t b = 0; b < batch_.blocks.size(); ++b) {
      const TreeBlock& block = batch_.blocks[b];
      const int64_t n = static_cast<int64_t>(block.parents.size());
      const auto part = [&](const at::Tensor& t) { return t.narrow(2, block.begin, n); };
      const bool causal = !masks[b].defined();
      const std::optional<at::Tensor> mask = causal ? std::nullopt : std::optional<at::Tensor>(masks[b]);
      contexts.push_back(at::scaled_dot_product_attention(part(q), part(k), part(v), mask, 0.0, causal));
    }
    const at::Tensor context = contexts.size() == 1 ? contexts.front() : at::cat(contexts, 2);
    return context.squeeze(0).transpose(0, 1).reshape({x.size(0), -1});
  }

  const model::CausalLm& model_;
  const TreeBatch& batch_;
  std::map<int64_t, std::vector<at::Tensor>> masks_;   // by sliding window, then by block
  model::Rotary rotary_;
};

}  // namespace

at::Tensor TreeHidden(const model::CausalLm& model, const TreeBatch& batch, const std::vector<int64_t>& nodes) {
  const at::NoGradGuard no_grad;
  return TreePass(model, batch).Hidden(at::tensor(nodes, at::kLong).to(model.device()));
}

}  // namespace refinery::eval
