// worker/task/checkpoint/gguf_model.h
//
// A GGUF model as a Hugging Face folder: config.json, generation_config.json, model.safetensors in bf16, tokenizer
// files.
//
// Weights are dequantized in float32 and rounded to bf16 once, a part at a time: memory stays small whatever the
// model's size.
// Llama files store the rows of Q and K interleaved for ggml's rotary embedding; the rows are put back into Hugging
// Face's order. A file without output.weight, or with one that is only another quantization of the embedding, has
// tied embeddings.
// Source: llama.cpp's convert_hf_to_gguf.py and gguf-py's constants.py (names and their meaning).
// Errors: INVALID_ARGUMENT for an unknown architecture or feature, DATA_LOSS for corrupt files; all name the file.

#pragma once

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "common/status.h"
#include "worker/task/checkpoint/gguf.h"

namespace refinery::checkpoint {

// What becomes of one tensor.
struct GgufSource {
  const GgufTensor* tensor = nullptr;
  int64_t interleaved_heads = 0;  // > 0: rows are interleaved within so many heads and must be put back
};

struct GgufModel {
  nlohmann::ordered_json config;
  nlohmann::ordered_json generation_config;
  std::map<std::string, GgufSource> weights;  // by Hugging Face name
};

StatusOr<GgufModel> DescribeGgufModel(const GgufFile& file);

// Writes the whole folder into `folder`, which must exist.
Status WriteGgufModelFolder(const GgufFile& file, const std::filesystem::path& folder);

}  // namespace refinery::checkpoint
