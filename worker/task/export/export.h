// worker/task/export/export.h
//
// The folders that leave Refinery, each loadable by the tools of the field and each read back after writing:
//   GPTQ     config.json (quantization_config), quantize_config.json, model.safetensors: HF GPTQ v1 or v2 for transformers with
//            gptqmodel, and for vLLM; layers of other widths stand in "dynamic"
//   compressed-tensors  config.json, model.safetensors: pack-quantized, for transformers with compressed-tensors, and for vLLM
//   GGUF     model.gguf: for llama.cpp
//   adapter  adapter_config.json, adapter_model.safetensors: for peft
//   merged   config.json, model.safetensors in bfloat16: base + adapter, merged in float32 and rounded once
// All codes are those of one quantized model; which settings each format holds and who loads it, loader_lint.h says.
// Folders for Python also carry generation_config.json, the tokenizer's files and the licence of the base folder. Every folder has
// a README.md (model card) and a manifest.json with the SHA-256 and size of every other file. A folder of a quantized model appears
// under its name when all of it has been written, synced and read back.
//
// Tied embeddings: config.json keeps the flag, model.embed_tokens.weight is written, lm_head.weight is not.
// Deterministic: no time stamps, no timings, no paths of this machine. `folder` may exist; it (adapter, merged: files of these
// names) is replaced.
// Errors: absl::Status naming the file; DATA_LOSS when what was read back differs.  Threads: functions.

#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "common/status.h"
#include "worker/task/checkpoint/model_folder.h"
#include "worker/task/checkpoint/peft_adapter.h"
#include "worker/task/export/loader_lint.h"
#include "worker/task/quantize/model_quantizer.h"

namespace refinery::exporting {

// What the model card says beyond what the export itself knows.
struct ModelCard {
  std::string name;        // title: "smollm2-arc"
  std::string base_model;  // a public name, "HuggingFaceTB/SmolLM2-135M-Instruct"; empty if unknown
  std::string license;     // SPDX id; empty if unknown
  std::string recipe;      // the recipe's text; empty if unknown
  std::vector<std::pair<std::string, std::string>> measurements;  // rows of a table: ("held-out perplexity", "7.13 +- 0.21")
};

// Codes and scales of `quantized` beside the other tensors of `base` in their own dtype; format kGptq or kGptqV2.
// INVALID_ARGUMENT when the format cannot hold the settings (loader_lint.h) or the modules are not those of `base`; DATA_LOSS for
// a scale that is not finite.
Status ExportGptqFolder(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized, const ModelCard& card,
                        const std::filesystem::path& folder, Format format = Format::kGptq);
// Reads such a folder back and compares every code, scale, zero point and remaining tensor with what it was made from.
Status VerifyGptqFolder(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized,
                        const std::filesystem::path& folder, Format format = Format::kGptq);

// The same for compressed-tensors. Scales stay float16 whatever the model's dtype: they are exact there.
Status ExportCompressedTensorsFolder(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized,
                                     const ModelCard& card, const std::filesystem::path& folder);
Status VerifyCompressedTensorsFolder(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized,
                                     const std::filesystem::path& folder);

struct GgufOptions {
  bool embeddings_q8_0 = false;  // token_embd rounded to Q8_0; else as it is, in 16 bits
  bool head_q8_0 = false;        // the same for an untied head that is not quantized
};
// folder/model.gguf: the codes as Q4_0, Q4_1 or Q8_0 (gguf_blocks.h), norms and biases in float32, the rest in 16 bits; tokenizer
// and chat template from the files of `base`.
Status ExportGgufFolder(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized, const ModelCard& card,
                        const GgufOptions& options, const std::filesystem::path& folder);
Status VerifyGgufFolder(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized, const GgufOptions& options,
                        const std::filesystem::path& folder);

Status ExportAdapterFolder(const checkpoint::PeftAdapter& adapter, const ModelCard& card, const std::filesystem::path& folder);

// INVALID_ARGUMENT when the adapter names a module that `base` does not have.
Status ExportMergedFolder(const checkpoint::ModelFolder& base, const checkpoint::PeftAdapter& adapter, const ModelCard& card,
                          const std::filesystem::path& folder);

// Bytes of tensors, without headers and padding.
struct ModelBytes {
  uint64_t model = 0;
  uint64_t without_embeddings = 0;  // without embeddings and head
  uint64_t linear = 0;              // all that stands for the weights of quantized layers
  uint64_t linear_bf16 = 0;         // the same weights in bfloat16

  double linear_ratio() const { return linear_bf16 == 0 ? 0 : static_cast<double>(linear) / static_cast<double>(linear_bf16); }
};

// Writes folder/manifest.json: {"format": 1, "files": [{"path", "digest", "size"}, ..]}, sorted by path, itself left out; of a
// quantized model also "bytes": {"model", "without_embeddings", "linear", "linear_bf16", "linear_ratio"}.
Status WriteManifest(const std::filesystem::path& folder, const ModelBytes* bytes = nullptr);
// The "bytes" of a manifest. DATA_LOSS where there are none.
StatusOr<ModelBytes> BytesOf(const std::filesystem::path& folder);
// DATA_LOSS naming the first file that is missing, added or different.
Status CheckManifest(const std::filesystem::path& folder);

}  // namespace refinery::exporting
