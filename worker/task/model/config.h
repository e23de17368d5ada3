// worker/task/model/config.h
//
// The shape of a decoder-only transformer, read from config.json.

#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/status.h"

namespace refinery::model {

struct RopeScaling {
  std::string type = "default";  // "default", "linear", "dynamic", "llama3", "yarn"
  double factor = 1;
  double low_freq_factor = 1;    // llama3
  double high_freq_factor = 4;   // llama3
  int64_t original_max_position = 0;
  double beta_fast = 32;         // yarn
  double beta_slow = 1;          // yarn
  double attention_factor = 0;   // yarn; 0 = derived
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
  int64_t sliding_window = 0;    // 0 = none (Mistral)
  std::vector<int32_t> eos_token_ids;

  // INVALID_ARGUMENT for an unknown architecture (lists the known ones) or a missing / contradictory field.
  static StatusOr<ModelConfig> FromJson(const nlohmann::json& config);
};

}  // namespace refinery::model
