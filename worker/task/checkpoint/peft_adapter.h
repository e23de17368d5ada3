// worker/task/checkpoint/peft_adapter.h
//
// LoRA adapters in PEFT's format (adapter_config.json, adapter_model.safetensors): readable and writable by peft 0.21.
// Names: base_model.model.<module>.lora_A.weight [r, in], ....lora_B.weight [out, r]; float32.
//
// Here one scale holds for all modules. Where PEFT's differ (rank_pattern, alpha_pattern), and where adapters are stacked, each
// module's scale is multiplied into its B and the common scale is 1; rsLoRA becomes the lora_alpha that gives its scale.

#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/status.h"

namespace refinery::checkpoint {

struct LoraPair {
  at::Tensor a;  // [r, in]  float32
  at::Tensor b;  // [out, r] float32
};

struct PeftAdapter {
  int64_t rank = 0;                       // "r"; modules may have ranks of their own
  double lora_alpha = 0;
  std::string base_model;                 // base_model_name_or_path
  std::map<std::string, LoraPair> pairs;  // by module: "model.layers.0.self_attn.q_proj"

  double scale() const { return lora_alpha / static_cast<double>(rank); }
};

// Errors: NOT_FOUND, DATA_LOSS; INVALID_ARGUMENT for what goes beyond LoRA on linear layers (DoRA, biases, modules_to_save, ...)
// and for patterns that are more than the end of a module's name.
StatusOr<PeftAdapter> LoadPeftAdapter(const std::filesystem::path& folder);
// One adapter whose effect is the sum of the given ones: factors side by side, A [r1+r2, in], B [out, r1+r2]. INVALID_ARGUMENT
// when there is none, or when two have factors of other sizes for the same module.
StatusOr<PeftAdapter> StackAdapters(const std::vector<PeftAdapter>& adapters);
// The content of adapter_config.json: the keys that every release of PEFT understands.
nlohmann::json PeftAdapterConfig(const PeftAdapter& adapter);
Status SavePeftAdapter(const PeftAdapter& adapter, const std::filesystem::path& folder);

// weight [out, in] of any float dtype -> the same dtype: float32(weight) + scale * B A, rounded once.
at::Tensor MergeLora(const at::Tensor& weight, const LoraPair& pair, double scale);

}  // namespace refinery::checkpoint
