// worker/task/recover/tunable_model.h
//
// A quantized model whose group scales (and norms, where wanted) are parameters. Everything else is shared with the source
// model or fixed: codes, zero points, biases, embeddings.
//
// A parameter is a relative change c, float32, 0 at the start: a scale is s0 (1 + c), a norm weight w0 (1 + c). So one learning
// rate suits layers of any magnitude. What the forward pass multiplies by is what would be stored: scales rounded to float16,
// norms and weights to the model's dtype; the gradient passes straight through the rounding.
//
// Memory: the weights of the linear layers once more than the source model, and of one layer their gradient.
// Errors: c10::Error on shape bugs; INVALID_ARGUMENT where the quantized model is of another model.
// Threads: one caller.

#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/model/causal_lm.h"
#include "worker/task/optim/optimizer.h"
#include "worker/task/quantize/model_quantizer.h"
#include "worker/task/recover/group_scales.h"

namespace refinery::recover {

// Linear layers that read the same input: one product, their weights one below the other.
struct TunableStage {
  std::vector<GroupScales> scales;
  std::vector<at::Tensor> changes;  // [out, groups] each, leaves
  at::Tensor weight;                // [sum of out, in]
  at::Tensor bias;                  // [sum of out] or undefined
};

// What the layers should put out: the source's outputs, [T, H] each. None, or one for every layer.
struct LayerTargets {
  std::vector<at::Tensor> outputs;
  double weight = 0;
};

class TunableModel {
 public:
  // `source` keeps its weights and must have no adapter attached.
  static StatusOr<std::unique_ptr<TunableModel>> Make(const model::CausalLm& source, const quantize::QuantizedModel& quantized,
                                                      bool tune_norms);

  // [T] tokens -> [T, H] after the final norm; differentiable in the parameters. With targets, `backward` of the result adds the
  // gradient of   weight x mean over tokens and layers of |h - target|^2 / |target|^2   to the one that it is given.
  at::Tensor Hidden(const model::PackedBatch& batch, const LayerTargets& targets = {}) const;

  // "model.layers.0.mlp.up_proj.scales", "model.layers.0.input_layernorm.weight": leaves of the relative changes.
  const std::vector<optim::Parameter>& scales() const { return scales_; }
  const std::vector<optim::Parameter>& norms() const { return norms_; }  // empty unless tuned
  // Takes the parameters' values into the weights. After every change of them.
  void Refresh();

  // What would be stored now: float16 scales by module, norms in the model's dtype by name.
  std::map<std::string, at::Tensor> StoredScales() const;
  std::map<std::string, at::Tensor> StoredNorms() const;

  const model::CausalLm& lm() const { return lm_; }

 private:
  struct Norm {
    at::Tensor weight;   // what the forward pass multiplies by
    at::Tensor initial;  // float32
    at::Tensor change;   // leaf; undefined where norms are not tuned
  };
  struct Layer {
    TunableStage qkv, o, gate_up, down;
    Norm input, post_attention, q, k;  // q and k: Qwen3 only
  };

  TunableModel(const model::CausalLm& source, bool tune_norms) : lm_(source), tune_norms_(tune_norms) {}
  TunableStage MakeStage(const std::vector<const model::Linear*>& linears, const quantize::QuantizedModel& quantized);
  Norm MakeNorm(const std::string& name, const at::Tensor& weight);
  at::Tensor Normalize(const at::Tensor& x, const Norm& norm) const;
  at::Tensor ForwardLayer(size_t index, const at::Tensor& hidden, const std::vector<int64_t>& lengths,
                          const model::Rotary& rotary) const;
  std::vector<TunableStage*> Stages();
  std::vector<Norm*> Norms();

  model::CausalLm lm_;  // shares its tensors with the source
  bool tune_norms_;
  std::vector<Layer> layers_;
  Norm final_;
  std::vector<optim::Parameter> scales_, norms_;
};

}  // namespace refinery::recover
