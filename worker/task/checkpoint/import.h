// worker/task/checkpoint/import.h
//
// From what a user names (a GGUF file or a Hugging Face folder) to Refinery's internal form, a Hugging Face folder in
// bf16.
//
// A GGUF file is converted once into <cache>/models/<source digest>-v1/ (config.json, generation_config.json,
// model.safetensors, tokenizer.json, tokenizer_config.json with the chat template; import.json holds the ModelRef);
// weights are dequantized in float32 and rounded to bf16 once. A Hugging Face folder is used where it lies. Both are
// named by the digest of the manifest (common/digest.h) of config.json, generation_config.json, tokenizer.json,
// tokenizer_config.json, chat_template.jinja and the weight files, so that a worker without the cache makes the same
// folder again and can prove it.
// Several processes may import the same file at once: one converts, the others wait for it. The digests of large
// files are remembered in <cache>/digests/ by size, inode and times of change.

#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "common/status.h"

namespace refinery::checkpoint {

struct ModelRef {
  std::string uri;               // what the user named
  std::string source_digest;     // GGUF: of the file; folder: equal to digest
  std::string digest;            // of the internal form: the manifest of config.json, tokenizer*.json and weight files
  std::string tokenizer_digest;  // of tokenizer.json
  std::string architecture;      // "LlamaForCausalLM"
  uint64_t parameters = 0;
  uint64_t vocab_size = 0;
};

// Imports `uri`. NOT_FOUND for a missing path; INVALID_ARGUMENT for an unknown architecture (lists the known ones) or
// tensor type; DATA_LOSS for corrupt files. All name the file.
StatusOr<ModelRef> ImportModel(const std::string& uri, const std::filesystem::path& cache);

// The folder of an imported model on this machine; imports it again when the cache does not hold it, and checks the
// digest (FAILED_PRECONDITION: the source changed since).
StatusOr<std::filesystem::path> ResolveModel(const ModelRef& ref, const std::filesystem::path& cache);

nlohmann::json ToJson(const ModelRef& ref);
StatusOr<ModelRef> ModelRefFromJson(const nlohmann::json& json);

}  // namespace refinery::checkpoint
