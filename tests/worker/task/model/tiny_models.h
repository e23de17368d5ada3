// tests/worker/task/model/tiny_models.h
//
// The tiny models of tests/vectors/model: configuration, answers of transformers, and weights drawn from the generator that
// make_vectors.py describes.

#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "worker/task/model/causal_lm.h"

namespace refinery::model {

// Those that the decoder runs as transformers does.
inline constexpr const char* kTinyModels[] = {"llama", "llama_llama3_bias", "llama_linear",      "mistral_window", "qwen2_yarn",
                                              "qwen3", "mistral_null_yarn", "qwen3_yarn_mscale", "qwen2_window",
                                              "qwen2_mixed_window", "qwen3_mixed_window"};
// Those that show more in a forward pass: sequences beyond max_position.
inline constexpr const char* kForwardModels[] = {"llama_dynamic"};

// tests/vectors/model/<name>.json
nlohmann::json TinyVectors(const std::string& name);
// The model of those vectors.
std::shared_ptr<CausalLm> TinyModel(const nlohmann::json& vectors, at::ScalarType dtype);
// Its weights by name, as a source.
TensorSource TinyWeights(const nlohmann::json& vectors);
ModelConfig TinyConfig(const nlohmann::json& vectors);

// ../shared/data/models/stories260K, or empty when absent. The weights are read by a reader of its own, so that this test
// does not depend on the checkpoint library.
std::string StoriesFolder();
std::shared_ptr<CausalLm> StoriesModel(at::ScalarType dtype);

// Ids as a packed batch.
PackedBatch Pack(const std::vector<std::vector<int64_t>>& sequences);

}  // namespace refinery::model
