// tests/worker/task/quantize/tiny_model.h
//
// A seeded two-layer Llama of a few thousand weights, as tensors by name: the fixture of the quantize and export tests.

#pragma once

#include <ATen/ATen.h>

#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "worker/task/model/causal_lm.h"

namespace refinery::testing {

inline nlohmann::json TinyConfig() {
  return {{"architectures", {"LlamaForCausalLM"}}, {"model_type", "llama"}, {"hidden_size", 64}, {"intermediate_size", 96},
          {"num_hidden_layers", 2}, {"num_attention_heads", 4}, {"num_key_value_heads", 2}, {"head_dim", 16},
          {"vocab_size", 80}, {"max_position_embeddings", 256}, {"rms_norm_eps", 1e-5}, {"rope_theta", 10000.0},
          {"tie_word_embeddings", true}, {"torch_dtype", "bfloat16"}, {"hidden_act", "silu"}, {"bos_token_id", 1},
          {"eos_token_id", 2}};
}

inline std::map<std::string, at::Tensor> TinyTensors(at::ScalarType dtype) {
  at::manual_seed(42);
  std::map<std::string, at::Tensor> tensors;
  const auto matrix = [&](const std::string& name, int64_t out, int64_t in) {
    tensors[name] = (at::randn({out, in}) * 0.15).to(dtype);
  };
  const auto norm = [&](const std::string& name) { tensors[name] = (1 + 0.3 * at::randn({64})).to(dtype); };
  matrix("model.embed_tokens.weight", 80, 64);
  norm("model.norm.weight");
  for (int layer = 0; layer < 2; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    norm(prefix + "input_layernorm.weight");
    norm(prefix + "post_attention_layernorm.weight");
    matrix(prefix + "self_attn.q_proj.weight", 64, 64);
    matrix(prefix + "self_attn.k_proj.weight", 32, 64);
    matrix(prefix + "self_attn.v_proj.weight", 32, 64);
    matrix(prefix + "self_attn.o_proj.weight", 64, 64);
    matrix(prefix + "mlp.gate_proj.weight", 96, 64);
    matrix(prefix + "mlp.up_proj.weight", 96, 64);
    matrix(prefix + "mlp.down_proj.weight", 64, 96);
  }
  return tensors;
}

inline std::shared_ptr<model::CausalLm> TinyModel(const std::map<std::string, at::Tensor>& tensors, at::ScalarType dtype) {
  const model::TensorSource source = [&](const std::string& name) -> StatusOr<at::Tensor> {
    const auto found = tensors.find(name);
    if (found == tensors.end()) return NotFound(name);
    return found->second;
  };
  return model::CausalLm::Load(model::ModelConfig::FromJson(TinyConfig()).value(), source, {.dtype = dtype}).value();
}

// Sequences of 5 to 40 ids.
inline std::vector<std::vector<int32_t>> TinyCalibration(int count) {
  at::manual_seed(7);
  std::vector<std::vector<int32_t>> sequences;
  for (int i = 0; i < count; ++i) {
    const at::Tensor ids = at::randint(0, 80, {5 + (i * 13) % 36}, at::kInt);
    sequences.emplace_back(ids.data_ptr<int32_t>(), ids.data_ptr<int32_t>() + ids.numel());
  }
  return sequences;
}

}  // namespace refinery::testing
