// worker/task/checkpoint/model_folder.h
//
// A Hugging Face model folder: config.json, tokenizer.json, tokenizer_config.json, and weights in model.safetensors
// or in shards named by model.safetensors.index.json. This is also Refinery's internal form of a model:
// `import_model` turns a GGUF file into such a folder in the worker's model cache (see import.h).
//
// A folder with `quantization_config.quant_method == "gptq"` (v1 or v2, 2/3/4/8 bit, also by module) also opens: Get("<prefix>.weight")
// returns the dequantized weight in float32, so that an exported artifact can be evaluated.

#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <regex>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/checkpoint/gptq_weights.h"
#include "worker/task/checkpoint/safetensors.h"

namespace refinery::checkpoint {

class ModelFolder {
 public:
  // NOT_FOUND / DATA_LOSS / INVALID_ARGUMENT, each naming the file.
  static StatusOr<std::shared_ptr<ModelFolder>> Open(const std::filesystem::path& folder);

  const std::filesystem::path& path() const { return path_; }
  const nlohmann::json& config() const { return config_; }
  bool Has(const std::string& name) const;
  std::vector<std::string> Names() const;  // sorted; for a GPTQ folder the dequantized names
  StatusOr<at::Tensor> Get(const std::string& name) const;
  // Of a GPTQ folder: the tensors that stand for "<prefix>.weight"; NOT_FOUND where that weight is not quantized.
  StatusOr<GptqTensors> GetGptq(const std::string& prefix) const;
  const std::optional<GptqFormat>& gptq() const { return gptq_; }
  // What "dynamic" says of that module; gptq() where it is silent. Only of a GPTQ folder.
  GptqFormat GptqFormatOf(const std::string& prefix) const;
  // Weights counted as numbers, whatever their stored form.
  uint64_t ParameterCount() const;
  // The safetensors files, relative to path(), sorted; with the index of a sharded model.
  const std::vector<std::string>& WeightFiles() const { return weight_files_; }

 private:
  ModelFolder() = default;
  Status OpenWeights();
  Status ReadQuantization();
  Status ReadDynamic(const nlohmann::json& dynamic);
  StatusOr<at::Tensor> GetStored(const std::string& name) const;

  std::filesystem::path path_;
  nlohmann::json config_;
  std::vector<std::shared_ptr<SafetensorsFile>> shards_;
  std::map<std::string, size_t> shard_of_;
  std::vector<std::string> weight_files_;
  std::optional<GptqFormat> gptq_;
  std::vector<std::pair<std::regex, GptqFormat>> overrides_;  // the first that matches from a name's beginning counts
};

}  // namespace refinery::checkpoint
