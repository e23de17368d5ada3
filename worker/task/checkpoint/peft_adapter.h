// worker/task/checkpoint/peft_adapter.h
//
// LoRA adapters in PEFT's format (adapter_config.json, adapter_model.safetensors): readable and writable by peft 0.21.
// Names: base_model.model.<module>.lora_A.weight [r, in], ....lora_B.weight [out, r]; float32.

#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "common/status.h"

namespace refinery::checkpoint {

struct LoraPair {
  at::Tensor a;  // [r, in]  float32
  at::Tensor b;  // [out, r] float32
};

struct PeftAdapter {
  int64_t rank = 0;
  double lora_alpha = 0;
  std::string base_model;                 // base_model_name_or_path
  std::map<std::string, LoraPair> pairs;  // by module: "model.layers.0.self_attn.q_proj"

  double scale() const { return lora_alpha / static_cast<double>(rank); }
};

// Errors: NOT_FOUND, DATA_LOSS; INVALID_ARGUMENT for what goes beyond plain LoRA (DoRA, biases, rank patterns). An
// rsLoRA adapter loads with the lora_alpha that gives the same scale.
StatusOr<PeftAdapter> LoadPeftAdapter(const std::filesystem::path& folder);
// The content of adapter_config.json: the keys that every release of PEFT understands.
nlohmann::json PeftAdapterConfig(const PeftAdapter& adapter);
Status SavePeftAdapter(const PeftAdapter& adapter, const std::filesystem::path& folder);

// weight [out, in] of any float dtype -> the same dtype: float32(weight) + scale * B A, rounded once.
at::Tensor MergeLora(const at::Tensor& weight, const LoraPair& pair, double scale);

}  // namespace refinery::checkpoint
