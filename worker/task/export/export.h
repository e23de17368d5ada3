// worker/task/export/export.h
//
// The folders that leave Refinery, each loadable by the tools of the field and each read back after writing:
//   GPTQ     config.json (quantization_config), quantize_config.json, model.safetensors: HF GPTQ v1 for transformers with
//            gptqmodel, and for vLLM
//   adapter  adapter_config.json, adapter_model.safetensors: for peft
//   merged   config.json, model.safetensors in bfloat16: base + adapter, merged in float32 and rounded once
// GPTQ and merged folders also carry generation_config.json, the tokenizer's files and the licence of the base folder. Every
// folder has a README.md (model card) and a manifest.json with the SHA-256 and size of every other file.
//
// Tied embeddings: config.json keeps the flag, model.embed_tokens.weight is written, lm_head.weight is not.
// Deterministic: no time stamps, no timings, no paths of this machine. `folder` may exist; files of these names are replaced.
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

// Codes and scales of `quantized` beside the other tensors of `base` in their own dtype. INVALID_ARGUMENT when the settings
// cannot be exported (CheckGroupSize) or the modules are not those of `base`.
Status ExportGptqFolder(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized, const ModelCard& card,
                        const std::filesystem::path& folder);

// Reads a GPTQ folder back and compares every code, scale and remaining tensor with what it was made from.
Status VerifyGptqFolder(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized,
                        const std::filesystem::path& folder);

Status ExportAdapterFolder(const checkpoint::PeftAdapter& adapter, const ModelCard& card, const std::filesystem::path& folder);

// INVALID_ARGUMENT when the adapter names a module that `base` does not have.
Status ExportMergedFolder(const checkpoint::ModelFolder& base, const checkpoint::PeftAdapter& adapter, const ModelCard& card,
                          const std::filesystem::path& folder);

// Writes folder/manifest.json: {"format": 1, "files": [{"path", "digest", "size"}, ..]}, sorted by path, itself left out.
Status WriteManifest(const std::filesystem::path& folder);
// DATA_LOSS naming the first file that is missing, added or different.
Status CheckManifest(const std::filesystem::path& folder);

}  // namespace refinery::exporting
