// worker/task/model/config.h
//
// The shape of a decoder-only transformer, read from config.json. What differs between families stands in
// worker/task/families; where a field is absent or null, the value is the one that transformers 5.23 takes.

#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "common/status.h"

namespace refinery::model {

// The fields of "rope_scaling" (transformers 4) or "rope_parameters" (transformers 5); see rope.h for what they do.
struct RopeScaling {
  std::string type = "default";  // "default", "linear", "dynamic", "llama3", "yarn"
  double factor = 1;
  double low_freq_factor = 1;    // llama3
  double high_freq_factor = 4;   // llama3
  int64_t original_max_position = 0;       // llama3, yarn
  double beta_fast = 32;                   // yarn
  double beta_slow = 1;                    // yarn
  std::optional<double> attention_factor;  // yarn; derived from the factor and mscale where it is absent
  double mscale = 0;                       // yarn; counts only together with mscale_all_dim
  double mscale_all_dim = 0;               // yarn
  bool truncate = true;                    // yarn: the ramp begins and ends at whole dimensions
};

struct ModelConfig {
  std::string architecture;      // "LlamaForCausalLM"
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t vocab_size = 0;
  int64_t max_position = 0;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000;
  RopeScaling rope_scaling;
  bool tie_word_embeddings = false;
  bool attention_bias = false;   // q, k, v (Qwen2)
  bool attention_output_bias = false;
  bool mlp_bias = false;         // gate, up, down (some Llama)
  bool qk_norm = false;          // Qwen3
  int64_t sliding_window = 0;    // tokens, of every layer; 0 = none, or layer_windows says
  std::vector<int64_t> layer_windows;  // one per layer where layers differ (Qwen2, Qwen3), 0 = none; else empty
  std::vector<int32_t> eos_token_ids;

  // Tokens that a query of that layer sees, itself included; 0 = all before it.
  int64_t WindowOf(int64_t layer) const {
    return layer_windows.empty() ? sliding_window : layer_windows[static_cast<size_t>(layer)];
  }

  // INVALID_ARGUMENT for an unknown architecture (lists the known ones) or a missing / contradictory field.
  static StatusOr<ModelConfig> FromJson(const nlohmann::json& config);
};

}  // namespace refinery::model
