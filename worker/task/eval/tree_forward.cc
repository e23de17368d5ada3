#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include "worker/task/eval/tree_forward.h"
#include "worker/task/model/ops.h"

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
    for (const TreeBlock& block : batch.blocks) {
      at::Tensor mask = BlockMask(block, batch.positions.data() + block.begin, model.config().sliding_window, model.dtype());
      masks_.push_back(mask.defined() ? mask.to(model.device()) : mask);
    }
    rotary_ = model.MakeRotary(at::tensor(batch.positions, at::kLong).to(model.device()));
  }

  at::Tensor Hidden() const {
    at::Tensor hidden = model_.Embed(at::tensor(batch_.token_ids, at::kLong).to(model_.device()));
    for (const model::DecoderLayer& layer : model_.layers) {
      const at::Tensor middle = hidden + layer.o(Attention(layer, model_.Normalize(hidden, layer.input_norm)));
      const at::Tensor normed = model_.Normalize(middle, layer.post_attention_norm);
      hidden = middle + layer.down(at::silu(layer.gate(normed)).mul_(layer.up(normed)));
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
    return model::Rotated(x, rotary_.cos, rotary_.sin, d);
  }

  at::Tensor Attention(const model::DecoderLayer& layer, const at::Tensor& x) const {
    const int64_t groups = model_.config().num_heads / model_.config().num_kv_heads;
    const at::Tensor q = Heads(Positioned(layer.q(x), layer.q_norm));
    const at::Tensor k = Heads(Positioned(layer.k(x), layer.k_norm)).repeat_interleave(groups, 1);
    const at::Tensor v = Heads(layer.v(x)).repeat_interleave(groups, 1);
    std::vector<at::Tensor> contexts;
    for (size_t b = 0; b < batch_.blocks.size(); ++b) {
      const TreeBlock& block = batch_.blocks[b];
      const int64_t n = static_cast<int64_t>(block.parents.size());
      const auto part = [&](const at::Tensor& t) { return t.narrow(2, block.begin, n); };
      const bool causal = !masks_[b].defined();
      const std::optional<at::Tensor> mask = causal ? std::nullopt : std::optional<at::Tensor>(masks_[b]);
      contexts.push_back(at::scaled_dot_product_attention(part(q), part(k), part(v), mask, 0.0, causal));
    }
    const at::Tensor context = contexts.size() == 1 ? contexts.front() : at::cat(contexts, 2);
    return context.squeeze(0).transpose(0, 1).reshape({x.size(0), -1});
  }

  const model::CausalLm& model_;
  const TreeBatch& batch_;
  std::vector<at::Tensor> masks_;
  model::Rotary rotary_;
};

}  // namespace

at::Tensor TreeHidden(const model::CausalLm& model, const TreeBatch& batch) {
  const at::NoGradGuard no_grad;
  return TreePass(model, batch).Hidden();
}

}  // namespace refinery::eval
