#include "worker/task/runtime/torch.h"

#include "worker/task/recover/tunable_model.h"

#include <utility>

#include "worker/task/model/matmul.h"
#include "worker/task/model/ops.h"

namespace refinery::recover {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr size_t kMaxLinears = 3;
constexpr double kSmallestSquare = 1e-12;  // of a target, so that a state of zeros divides nothing by zero

// y = x W^T + bias. The gradient goes to the input and to the changes of the scales; that of the weights lives only inside
// `backward`, one stage at a time.
struct ProjectFunction : Function<ProjectFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                            const TunableStage* stage) {
    ctx->save_for_backward({x, stage->weight});
    ctx->saved_data["stage"] = reinterpret_cast<int64_t>(stage);  // the model outlives its graphs
    return model::Matmul(x, stage->weight, stage->bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto* stage = reinterpret_cast<const TunableStage*>(ctx->saved_data["stage"].toInt());
    const at::Tensor dy = grads[0].contiguous();
    variable_list result(2 + kMaxLinears);
    if (ctx->needs_input_grad(0)) result[0] = model::MatmulByInputs(dy, saved[1]);
    const at::Tensor dw = model::MatmulByInputs(dy.t().contiguous(), saved[0]);
    int64_t row = 0;
    for (size_t i = 0; i < stage->scales.size(); ++i) {
      const GroupScales& scales = stage->scales[i];
      const int64_t rows = scales.initial().size(0);
      result[1 + i] = scales.Gradient(dw.narrow(0, row, rows)).mul_(scales.initial());
      row += rows;
    }
    return result;
  }
};

// Stands behind a norm y = xhat w0 (1 + c) and lets the gradient of c leave: d L / d c = sum of dL/dy y / (1 + c).
struct NormTap : Function<NormTap> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& y, const at::Tensor& change) {
    ctx->save_for_backward({y, change});
    return y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor products = (grads[0] * saved[0]).reshape({-1, saved[1].size(0)});
    return {grads[0], products.sum(0, false, at::kFloat).div_(saved[1] + 1)};
  }
};

// Passes a layer's output on and, on the way back, adds the gradient of   weight sum over tokens of |h - target|^2 / |target|^2.
struct TargetTap : Function<TargetTap> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& hidden, const at::Tensor& target, double weight) {
    ctx->save_for_backward({hidden, target});
    ctx->saved_data["weight"] = weight;
    return hidden.view_as(hidden);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::ScalarType type = saved[0].scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const at::Tensor target = saved[1].to(type);
    const at::Tensor size = target.square().sum(1, true).clamp_min_(kSmallestSquare);
    const at::Tensor factor = size.reciprocal_().mul_(2 * ctx->saved_data["weight"].toDouble());
    const at::Tensor pull = (saved[0].to(type) - target).mul_(factor);
    return {pull.add_(grads[0]).to(grads[0].scalar_type()), {}, {}};
  }
};

at::Tensor Leaf(at::IntArrayRef shape, at::Device device) {
  return at::zeros(shape, at::TensorOptions().dtype(at::kFloat).device(device)).requires_grad_(true);
}

at::Tensor Project(const at::Tensor& x, const TunableStage& stage) {
  // Autograd does not take undefined inputs: an empty tensor stands for a layer that is not there.
  const at::Tensor none = at::empty({0});
  const auto change = [&](size_t i) { return i < stage.changes.size() ? stage.changes[i] : none; };
  return ProjectFunction::apply(x, change(0), change(1), change(2), &stage);
}

Status CheckLinears(const model::CausalLm& source, const quantize::QuantizedModel& quantized) {
  size_t wanted = 0;
  for (const model::DecoderLayer& layer : source.layers) {
    for (const model::Linear* linear : const_cast<model::DecoderLayer&>(layer).Linears()) {
      ++wanted;
      if (linear->packed != nullptr || linear->lora_a.defined()) {
        return InvalidArgument(linear->name, ": the source model must be loaded unpacked and have its adapter merged");
      }
      const auto found = quantized.linears.find(linear->name);
      if (found == quantized.linears.end()) {
        return InvalidArgument("the quantized artifact has no ", linear->name, ": it was made from another model");
      }
      if (found->second.codes.sizes() != linear->weight.sizes()) {
        return InvalidArgument("the quantized artifact's ", linear->name, " is ", found->second.codes.size(0), " x ",
                               found->second.codes.size(1), ", the source model's ", linear->weight.size(0), " x ",
                               linear->weight.size(1));
      }
    }
  }
  if (wanted == quantized.linears.size()) return absl::OkStatus();
  return InvalidArgument("the quantized artifact has ", quantized.linears.size(), " modules, the source model ", wanted);
}

}  // namespace

StatusOr<std::unique_ptr<TunableModel>> TunableModel::Make(const model::CausalLm& source,
                                                           const quantize::QuantizedModel& quantized, bool tune_norms) {
  RF_RETURN_IF_ERROR(CheckLinears(source, quantized));
  std::unique_ptr<TunableModel> model(new TunableModel(source, tune_norms));
  for (size_t i = 0; i < model->lm_.layers.size(); ++i) {
    model::DecoderLayer& layer = model->lm_.layers[i];
    const std::string prefix = Join("model.layers.", i, ".");
    Layer tunable;
    tunable.input = model->MakeNorm(prefix + "input_layernorm.weight", layer.input_norm);
    tunable.qkv = model->MakeStage({&layer.q, &layer.k, &layer.v}, quantized);
    if (source.config().qk_norm) {
      tunable.q = model->MakeNorm(prefix + "self_attn.q_norm.weight", layer.q_norm);
      tunable.k = model->MakeNorm(prefix + "self_attn.k_norm.weight", layer.k_norm);
    }
    tunable.o = model->MakeStage({&layer.o}, quantized);
    tunable.post_attention = model->MakeNorm(prefix + "post_attention_layernorm.weight", layer.post_attention_norm);
    tunable.gate_up = model->MakeStage({&layer.gate, &layer.up}, quantized);
    tunable.down = model->MakeStage({&layer.down}, quantized);
    model->layers_.push_back(std::move(tunable));
    // The source's weights are not needed here: only what the layers share (names, windows) stays.
    for (model::Linear* linear : layer.Linears()) linear->weight.reset();
  }
  model->final_ = model->MakeNorm("model.norm.weight", model->lm_.final_norm);
  model->Refresh();
  return model;
}

TunableStage TunableModel::MakeStage(const std::vector<const model::Linear*>& linears,
                                     const quantize::QuantizedModel& quantized) {
  const at::NoGradGuard no_grad;
  TunableStage stage;
  int64_t outputs = 0;
  std::vector<at::Tensor> biases;
  for (const model::Linear* linear : linears) {
    const at::Device device = lm_.device();
    stage.scales.emplace_back(quantized.linears.at(linear->name), device);
    stage.changes.push_back(Leaf(stage.scales.back().initial().sizes(), device));
    scales_.push_back({linear->name + ".scales", stage.changes.back()});
    outputs += linear->outputs();
    biases.push_back(linear->bias.defined() ? linear->bias : at::zeros({linear->outputs()}, linear->weight.options()));
    if (linear->bias.defined()) stage.bias = linear->bias;
  }
  if (stage.bias.defined()) stage.bias = at::cat(biases);
  stage.weight = at::empty({outputs, linears[0]->inputs()}, linears[0]->weight.options());
  return stage;
}

TunableModel::Norm TunableModel::MakeNorm(const std::string& name, const at::Tensor& weight) {
  Norm norm{.weight = weight.clone(), .initial = weight.to(at::kFloat)};
  if (!tune_norms_) return norm;
  norm.change = Leaf(weight.sizes(), weight.device());
  norms_.push_back({name, norm.change});
  return norm;
}

std::vector<TunableStage*> TunableModel::Stages() {
  std::vector<TunableStage*> stages;
  for (Layer& layer : layers_) {
    for (TunableStage* stage : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) stages.push_back(stage);
  }
  return stages;
}

// In the order of norms_.
std::vector<TunableModel::Norm*> TunableModel::Norms() {
  std::vector<Norm*> norms;
  for (Layer& layer : layers_) {
    norms.push_back(&layer.input);
    if (layer.q.weight.defined()) norms.insert(norms.end(), {&layer.q, &layer.k});
    norms.push_back(&layer.post_attention);
  }
  norms.push_back(&final_);
  return norms;
}

void TunableModel::Refresh() {
  const at::NoGradGuard no_grad;
  for (TunableStage* stage : Stages()) {
    int64_t row = 0;
    for (size_t i = 0; i < stage->scales.size(); ++i) {
      const GroupScales& scales = stage->scales[i];
      const int64_t rows = scales.initial().size(0);
      scales.Expand(scales.Stored(scales.initial() * (stage->changes[i] + 1)), stage->weight.narrow(0, row, rows));
      row += rows;
    }
  }
  for (Norm* norm : Norms()) {
    if (norm->change.defined()) norm->weight.copy_(norm->initial * (norm->change + 1));
  }
}

std::map<std::string, at::Tensor> TunableModel::StoredScales() const {
  const at::NoGradGuard no_grad;
  std::map<std::string, at::Tensor> stored;
  size_t next = 0;  // scales_ is in the order of the stages
  for (TunableStage* stage : const_cast<TunableModel*>(this)->Stages()) {
    for (size_t i = 0; i < stage->scales.size(); ++i, ++next) {
      const std::string& name = scales_[next].name;
      stored[name.substr(0, name.rfind('.'))] =
          stage->scales[i].Stored(stage->scales[i].initial() * (stage->changes[i] + 1)).cpu();
    }
  }
  return stored;
}

std::map<std::string, at::Tensor> TunableModel::StoredNorms() const {
  std::map<std::string, at::Tensor> stored;
  if (!tune_norms_) return stored;
  size_t next = 0;
  for (const Norm* norm : const_cast<TunableModel*>(this)->Norms()) stored[norms_[next++].name] = norm->weight.clone().cpu();
  return stored;
}

at::Tensor TunableModel::Normalize(const at::Tensor& x, const Norm& norm) const {
  const at::Tensor y = lm_.Normalize(x, norm.weight);
  return norm.change.defined() ? NormTap::apply(y, norm.change) : y;
}

at::Tensor TunableModel::ForwardLayer(size_t index, const at::Tensor& hidden, const std::vector<int64_t>& lengths,
                                      const model::Rotary& rotary) const {
  const Layer& layer = layers_[index];
  const model::ModelConfig& c = lm_.config();
  at::Tensor qkv = Project(Normalize(hidden, layer.input), layer.qkv);
  if (layer.q.weight.defined()) {
    const int64_t tokens = qkv.size(0), query = c.num_heads * c.head_dim, key = c.num_kv_heads * c.head_dim;
    const auto heads = [&](int64_t begin, int64_t width, const Norm& norm) {
      return Normalize(qkv.narrow(1, begin, width).reshape({tokens, -1, c.head_dim}), norm).reshape({tokens, width});
    };
    qkv = at::cat({heads(0, query, layer.q), heads(query, key, layer.k), qkv.narrow(1, query + key, key)}, 1);
  }
  const model::AttentionShape shape{c.num_heads, c.num_kv_heads, c.head_dim, lm_.layers[index].sliding_window};
  const at::Tensor context = model::PackedAttention(qkv, rotary.cos, rotary.sin, lengths, shape);
  const at::Tensor middle = hidden + Project(context, layer.o);
  const at::Tensor gate_up = Project(Normalize(middle, layer.post_attention), layer.gate_up);
  return middle + Project(model::SiluMul(gate_up), layer.down);
}

at::Tensor TunableModel::Hidden(const model::PackedBatch& batch, const LayerTargets& targets) const {
  TORCH_CHECK(targets.outputs.empty() || targets.outputs.size() == layers_.size(), "Hidden: ", targets.outputs.size(), " targets for ",
              layers_.size(), " layers");
  const model::Rotary rotary = lm_.MakeRotary(batch.lengths);
  at::Tensor hidden = lm_.Embed(batch.token_ids.to(lm_.device()));
  const double weight = targets.weight / static_cast<double>(layers_.size() * static_cast<size_t>(hidden.size(0)));
  for (size_t i = 0; i < layers_.size(); ++i) {
    hidden = ForwardLayer(i, hidden, batch.lengths, rotary);
    if (!targets.outputs.empty()) hidden = TargetTap::apply(hidden, targets.outputs[i], weight);
  }
  return Normalize(hidden, final_);
}

}  // namespace refinery::recover
