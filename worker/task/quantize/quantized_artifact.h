// worker/task/quantize/quantized_artifact.h
//
// A quantized model as an artifact: only what quantization made, a few megabytes; base model and adapter are named elsewhere.
//
//   quantized.safetensors   per module <m> the tensors of HF GPTQ v1: <m>.qweight int32 [in*bits/32, out],
//                           <m>.qzeros int32 [groups, out*bits/32], <m>.scales float16 [groups, out], <m>.g_idx int32 [in]
//   quantized.json          {"format": 2, "bits", "group_size", "damp_fraction", "grid", "order", "alpha", "refine_sweeps",
//                            "calibration": {"digest", "tokens", and what made them (docs/formats.md)},
//                            "modules": {<m>: {"in", "out", "bits", "group_size", "relative_error", "rtn_relative_error",
//                                              "damp_fraction", "dead_columns", "notes": [..]}}}
//   norms.safetensors       only where recovery tuned them: norm weights by their names in the base model. quantized.json then lists
//                           these names as "norms", and "recovery" says how scales and norms were tuned
//
// Modules may have widths of their own. Format 1, which had one for all and "order_groups" for grid and order, is still read.
// The same quantization gives the same bytes: no times, no machine.
// Errors: NOT_FOUND, DATA_LOSS naming file and module.  Threads: functions.

#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"
#include "worker/task/checkpoint/safetensors.h"
#include "worker/task/model/causal_lm.h"
#include "worker/task/quantize/model_quantizer.h"

namespace refinery::quantize {

// "full_range", "symmetric", "asymmetric"; "groups", "natural", "classic": the words of recipes and files.
const char* GridName(Grid grid);
const char* OrderName(ColumnOrderKind order);
std::optional<Grid> GridFromName(std::string_view name);
std::optional<ColumnOrderKind> OrderFromName(std::string_view name);
nlohmann::json SettingsToJson(const GptqSettings& settings);
// Of a quantized.json of either format. Throws nlohmann::json::exception.
GptqSettings SettingsFromJson(const nlohmann::json& json);

Status SaveQuantized(const QuantizedModel& quantized, const std::filesystem::path& folder);
// The same bytes from a journal, one module in memory at a time; the modules are those of `quantized.reports`.
Status SaveQuantized(const QuantizedModel& quantized, Journal& journal, const std::filesystem::path& folder,
                     runtime::Reporter& reporter);
StatusOr<QuantizedModel> LoadQuantized(const std::filesystem::path& folder);

// Replaces the weight of every linear layer by its dequantized one, and norms by tuned ones. INVALID_ARGUMENT when modules or shapes differ.
Status ApplyQuantized(model::CausalLm& model, const QuantizedModel& quantized);

// Makes a model that has had ApplyQuantized decode from packed codes (model/packed_weight.h), where their form allows: to time
// what a low-bit runtime reaches. Its dequantized weights are let go.
void PackQuantized(model::CausalLm& model, const QuantizedModel& quantized);

// The four tensors of one module in any GPTQ v1 file, checked and unpacked.
StatusOr<QuantizedLinear> ReadPackedLinear(const checkpoint::SafetensorsFile& file, const std::string& module,
                                           const PackedLayout& layout);

// SHA-256 of the sequences: for each its length and its ids, int64 little-endian.
std::string CalibrationDigest(const std::vector<std::vector<int32_t>>& sequences);

// Bytes of codes, scales and zero points of all modules: what a low-bit runtime reads.
int64_t QuantizedBytes(const QuantizedModel& quantized);

}  // namespace refinery::quantize
