#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include "worker/task/model/matmul.h"
#include "worker/task/model/ops.h"
#include "worker/task/model/projection.h"

namespace refinery::model {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr size_t kMaxLayers = 3;

struct Plan {
  std::vector<const Linear*> layers;
  at::Tensor weight, bias;  // stacked; weight is undefined when the weights do not lie side by side
  int64_t outputs = 0;
};

Plan MakePlan(const std::vector<const Linear*>& layers) {
  Plan plan{.layers = layers};
  std::vector<at::Tensor> weights, biases;
  for (const Linear* layer : layers) {
    plan.outputs += layer->outputs();
    if (layer->packed == nullptr) weights.push_back(layer->weight);
    if (layer->bias.defined()) biases.push_back(layer->bias);
  }
  // Stacked biases are needed only where all layers have one, which is where the loader stacks them.
  if (!biases.empty() && biases.size() != layers.size()) return plan;
  plan.bias = biases.empty() ? at::Tensor() : StackedView(biases);
  if (weights.size() < layers.size()) return plan;  // packed
  if (biases.empty() || plan.bias.defined()) plan.weight = StackedView(weights);
  return plan;
}

at::Tensor Base(const at::Tensor& x, const Plan& plan) {
  if (plan.weight.defined()) return Matmul(x, plan.weight, plan.bias);
  std::vector<at::Tensor> outputs;
  for (const Linear* layer : plan.layers) {
    outputs.push_back(Matmul(x, layer->Weight(x.scalar_type()), layer->bias));
  }
  return outputs.size() == 1 ? outputs.front() : at::cat(outputs, 1);
}

// d(x) of Base.
at::Tensor BaseBackward(const at::Tensor& dy, const variable_list& weights) {
  at::Tensor dx;
  int64_t column = 0;
  for (const at::Tensor& weight : weights) {
    const at::Tensor part = dy.narrow(1, column, weight.size(0));
    column += weight.size(0);
    dx = MatmulByInputs(part, weight, dx);
  }
  return dx;
}

// Saved: x, u = x A^T of all layers side by side [T, sum r], A stacked [sum r, in], then B of each layer that has factors,
// then the weight (stacked, or one per layer). All in x's dtype.
struct ProjectFunction : Function<ProjectFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& a0, const at::Tensor& b0,
                            const at::Tensor& a1, const at::Tensor& b1, const at::Tensor& a2, const at::Tensor& b2,
                            const Plan& plan) {
    const at::Tensor factors_a[] = {a0, a1, a2}, factors_b[] = {b0, b1, b2};
    const at::Tensor y = Base(x, plan);
    std::vector<at::Tensor> stack;
    for (const at::Tensor& a : factors_a) {
      if (a.numel() > 0) stack.push_back(a.to(x.scalar_type()));
    }
    const at::Tensor a = at::cat(stack), u = at::linear(x, a);
    variable_list saved = {x, u, a};
    std::vector<int64_t> facts;  // per layer: outputs, rank (0 = no factors)
    std::vector<double> scales;
    int64_t column = 0, rank_column = 0;
    for (size_t i = 0; i < plan.layers.size(); ++i) {
      const int64_t outputs = plan.layers[i]->weight.size(0), rank = factors_a[i].size(0);
      if (rank > 0) {
        const at::Tensor b = factors_b[i].to(x.scalar_type());
        y.narrow(1, column, outputs).addmm_(u.narrow(1, rank_column, rank), b.t(), 1, plan.layers[i]->lora_scale);
        saved.push_back(b);
      }
      facts.insert(facts.end(), {outputs, rank});
      scales.push_back(plan.layers[i]->lora_scale);
      column += outputs;
      rank_column += rank;
    }
    if (plan.weight.defined()) {
      saved.push_back(plan.weight);
    } else {
      for (const Linear* layer : plan.layers) saved.push_back(layer->weight);
    }
    ctx->save_for_backward(saved);
    ctx->saved_data["facts"] = facts;
    ctx->saved_data["scales"] = scales;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<int64_t> facts = ctx->saved_data["facts"].toIntVector();
    const std::vector<double> scales = ctx->saved_data["scales"].toDoubleVector();
    const at::Tensor dy = grads[0].contiguous();
    const at::Tensor &x = saved[0], &u = saved[1], &a = saved[2];
    const at::Tensor du = at::empty_like(u);
    variable_list result(2 + 2 * kMaxLayers);
    size_t next = 3;
    int64_t column = 0, rank_column = 0;
    for (size_t i = 0; i < scales.size(); ++i) {
      const int64_t outputs = facts[2 * i], rank = facts[2 * i + 1];
      if (rank > 0) {
        const at::Tensor part = dy.narrow(1, column, outputs);
        du.narrow(1, rank_column, rank).copy_(at::mm(part, saved[next++]).mul_(scales[i]));
        result[2 + 2 * i] = at::mm(part.t(), u.narrow(1, rank_column, rank)).to(at::kFloat).mul_(scales[i]);
      }
      column += outputs;
      rank_column += rank;
    }
    const at::Tensor da = at::mm(du.t(), x).to(at::kFloat);
    rank_column = 0;
    for (size_t i = 0; i < scales.size(); ++i) {
      const int64_t rank = facts[2 * i + 1];
      if (rank > 0) result[1 + 2 * i] = da.narrow(0, rank_column, rank);
      rank_column += rank;
    }
    if (ctx->needs_input_grad(0)) {
      result[0] = BaseBackward(dy, variable_list(saved.begin() + static_cast<std::ptrdiff_t>(next), saved.end()));
      result[0].addmm_(du, a);
    }
    return result;
  }
};

}  // namespace

at::Tensor StackedView(const std::vector<at::Tensor>& parts) {
  const at::Tensor& first = parts.front();
  int64_t rows = 0, offset = first.storage_offset();
  for (const at::Tensor& part : parts) {
    if (!part.is_contiguous() || part.scalar_type() != first.scalar_type() || part.dim() != first.dim() ||
        part.size(-1) != (part.dim() == 1 ? part.size(-1) : first.size(-1)) || !part.is_alias_of(first) ||
        part.storage_offset() != offset) {
      return {};
    }
    rows += part.size(0);
    offset += part.numel();
  }
  if (first.dim() == 1) return first.as_strided({rows}, {1}, first.storage_offset());
  return first.as_strided({rows, first.size(1)}, {first.size(1), 1}, first.storage_offset());
}

at::Tensor Project(const at::Tensor& x, const std::vector<const Linear*>& layers) {
  TORCH_CHECK(!layers.empty() && layers.size() <= kMaxLayers, "Project: ", layers.size(), " layers");
  TORCH_CHECK(x.dim() == 2 && x.size(1) == layers.front()->inputs(), layers.front()->name, ": x ", x.sizes(), ", weight [",
              layers.front()->outputs(), ", ", layers.front()->inputs(), "]");
  const Plan plan = MakePlan(layers);
  bool has_factors = false, packed = false;
  for (const Linear* layer : layers) {
    has_factors |= layer->lora_a.defined();
    packed |= layer->packed != nullptr;
  }
  TORCH_CHECK(!has_factors || !packed, layers.front()->name, ": packed weights take no adapter");
  if (!has_factors) return Base(x, plan);
  // Autograd does not take undefined inputs: an empty tensor stands for "no factors".
  const at::Tensor none = at::empty({0}, x.options().dtype(at::kFloat));
  const auto a = [&](size_t i) { return i < layers.size() && layers[i]->lora_a.defined() ? layers[i]->lora_a : none; };
  const auto b = [&](size_t i) { return i < layers.size() && layers[i]->lora_b.defined() ? layers[i]->lora_b : none; };
  return ProjectFunction::apply(x, a(0), b(0), a(1), b(1), a(2), b(2), plan);
}

namespace {

bool IsPlain(const Linear& layer) { return layer.packed == nullptr && !layer.lora_a.defined(); }

}  // namespace

at::Tensor ProjectGated(const at::Tensor& x, const Linear& gate, const Linear& up) {
  const bool plain = IsPlain(gate) && IsPlain(up) && !gate.bias.defined() && !up.bias.defined();
  if (plain && TakesPairMatmul(x, gate.weight) && TakesPairMatmul(x, up.weight)) return GatedMatmul(x, gate.weight, up.weight);
  return SiluMul(Project(x, {&gate, &up}));
}

at::Tensor ProjectOnto(const at::Tensor& residual, const at::Tensor& x, const Linear& layer) {
  if (IsPlain(layer) && TakesPairMatmul(x, layer.weight) && !residual.requires_grad()) {
    return Matmul(x, layer.weight, layer.bias, residual);
  }
  return residual + layer(x);
}

}  // namespace refinery::model
