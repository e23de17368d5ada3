// The layout of compressed-tensors' pack-quantized: weight_packed [out, in*bits/32] int32 along `in`, least significant first,
// holding codes as they are (q_signed + 2^(bits-1)), weight_scale [out, groups], weight_shape [2] int64 and, with zero points,
// weight_zero_point [out*bits/32, groups] int32 packed along `out`. At 4 and 8 bits these are HF GPTQ v2's words transposed.

#include "worker/task/runtime/torch.h"

#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "common/files.h"
#include "worker/task/checkpoint/gptq_weights.h"
#include "worker/task/checkpoint/safetensors.h"
#include "worker/task/export/export.h"
#include "worker/task/export/folder_files.h"
#include "worker/task/export/parts.h"

namespace refinery::exporting {
namespace {

using nlohmann::json;
using quantize::QuantizedLinear;

constexpr char kWeights[] = "model.safetensors";
// Of the library whose readers the folder is tested with.
constexpr char kLibraryVersion[] = "0.20.0";

bool IsWholeRow(const QuantizedLinear& linear) { return linear.group_size == linear.codes.size(1); }

// Newer keys (scale_dtype, zp_dtype) are left out: older readers refuse keys that they do not know.
json WeightScheme(const QuantizedLinear& linear, bool whole_row) {
  return {{"num_bits", linear.bits},
          {"type", "int"},
          {"symmetric", !linear.zeros.defined()},
          {"strategy", whole_row ? "channel" : "group"},
          {"group_size", whole_row ? json() : json(linear.group_size)},
          {"dynamic", false},
          {"actorder", nullptr},
          {"block_structure", nullptr},
          {"observer", "minmax"},
          {"observer_kwargs", json::object()}};
}

// One group of settings for all linear layers; where they differ, one per kind of settings, whose targets are names.
json ConfigGroups(const quantize::QuantizedModel& quantized) {
  const bool whole_row = quantized.settings.group_size == -1;
  std::map<std::string, std::pair<json, std::vector<std::string>>> schemes;
  for (const auto& [module, linear] : quantized.linears) {
    json scheme = WeightScheme(linear, whole_row && IsWholeRow(linear));
    auto& [kept, modules] = schemes[scheme.dump()];
    kept = std::move(scheme);
    modules.push_back(module);
  }
  json groups = json::object();
  for (const auto& [text, scheme] : schemes) {
    const json targets = schemes.size() == 1 ? json::array({"Linear"}) : json(scheme.second);
    groups[Join("group_", groups.size())] = {
        {"targets", targets}, {"input_activations", nullptr}, {"output_activations", nullptr}, {"weights", scheme.first}};
  }
  return groups;
}

json QuantizationConfig(const quantize::QuantizedModel& quantized) {
  json config = {{"quant_method", "compressed-tensors"},
                 {"format", "pack-quantized"},
                 {"quantization_status", "compressed"},
                 {"version", kLibraryVersion},
                 {"global_compression_ratio", nullptr},
                 {"ignore", quantized.linears.contains("lm_head") ? json::array() : json::array({"lm_head"})},
                 {"kv_cache_scheme", nullptr},
                 {"sparsity_config", json::object()},
                 {"transform_config", json::object()},
                 {"config_groups", ConfigGroups(quantized)}};
  return config;
}

void AddPacked(const std::string& module, const QuantizedLinear& linear, LazyTensors* tensors) {
  const int64_t out = linear.codes.size(0), in = linear.codes.size(1), groups = linear.scales.size(1), bits = linear.bits;
  (*tensors)[module + ".weight_packed"] = {
      .spec = {.dtype = at::kInt, .shape = {out, in * bits / 32}},
      .make = [&linear]() -> StatusOr<at::Tensor> { return quantize::PackGptqV2(linear).qweight.t().contiguous(); }};
  (*tensors)[module + ".weight_scale"] = {.spec = {.dtype = at::kHalf, .shape = {out, groups}},
                                          .make = [&linear]() -> StatusOr<at::Tensor> { return linear.scales.cpu(); }};
  (*tensors)[module + ".weight_shape"] = {
      .spec = {.dtype = at::kLong, .shape = {2}},
      .make = [out, in]() -> StatusOr<at::Tensor> { return at::tensor({out, in}, at::kLong); }};
  if (!linear.zeros.defined()) return;
  (*tensors)[module + ".weight_zero_point"] = {
      .spec = {.dtype = at::kInt, .shape = {out * bits / 32, groups}},
      .make = [&linear]() -> StatusOr<at::Tensor> { return quantize::PackGptqV2(linear).qzeros.t().contiguous(); }};
}

// By the reader of GPTQ checkpoints, for which the words only have to be transposed back.
Status VerifyModule(const checkpoint::SafetensorsFile& file, const std::string& path, const std::string& module,
                    const QuantizedLinear& linear) {
  RF_ASSIGN_OR_RETURN(const at::Tensor packed, file.Get(module + ".weight_packed"));
  RF_ASSIGN_OR_RETURN(const at::Tensor scales, file.Get(module + ".weight_scale"));
  RF_ASSIGN_OR_RETURN(const at::Tensor shape, file.Get(module + ".weight_shape"));
  const int64_t out = linear.codes.size(0), in = linear.codes.size(1), groups = linear.scales.size(1);
  if (packed.dim() != 2 || scales.dim() != 2 || !at::equal(shape, at::tensor({out, in}, at::kLong)))
    return DataLoss(path, ": the shapes of ", module, " do not read back as they were written");
  checkpoint::GptqTensors tensors{.qweight = packed.t(), .scales = scales.t()};
  tensors.qzeros = at::zeros({groups, out * linear.bits / 32}, at::kInt);
  if (linear.zeros.defined()) {
    RF_ASSIGN_OR_RETURN(const at::Tensor zeros, file.Get(module + ".weight_zero_point"));
    tensors.qzeros = zeros.t();
  }
  RF_ASSIGN_OR_RETURN(const checkpoint::GptqCodes read,
                      checkpoint::UnpackGptq(tensors, {.bits = linear.bits, .group_size = linear.group_size, .zeros_minus_one = false}));
  return CompareCodes(path, module, linear, read.codes, scales, linear.zeros.defined() ? read.zeros : ZerosOf(linear));
}

}  // namespace

Status ExportCompressedTensorsFolder(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& source,
                                     const ModelCard& card, const std::filesystem::path& folder) {
  RF_RETURN_IF_ERROR(CheckModules(base, source, Format::kCompressedTensors));
  const quantize::QuantizedModel quantized = Widened(source);
  return WriteWholeFolder(folder, [&](const std::filesystem::path& partial) -> Status {
    LazyTensors tensors;
    RF_RETURN_IF_ERROR(AddKept(base, quantized, &tensors));
    for (const auto& [module, linear] : quantized.linears) AddPacked(module, linear, &tensors);
    RF_RETURN_IF_ERROR(WriteLazyTensors(partial / kWeights, tensors));
    json config = base.config();
    config["quantization_config"] = QuantizationConfig(quantized);  // whose fields the library checks: no room for others
    config["refinery"] = Provenance(quantized);
    RF_RETURN_IF_ERROR(WriteFileAtomically(partial / "config.json", config.dump(2) + "\n"));
    RF_RETURN_IF_ERROR(CopyCompanions(base.path(), partial));
    RF_RETURN_IF_ERROR(WriteModelCard(Kind::kCompressedTensors, card, QuantizedFacts(quantized), partial));
    RF_RETURN_IF_ERROR(VerifyCompressedTensorsFolder(base, quantized, partial));
    RF_ASSIGN_OR_RETURN(const ModelBytes bytes, MeasureFolder(quantized, partial));
    return WriteManifest(partial, &bytes);
  });
}

Status VerifyCompressedTensorsFolder(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& source,
                                     const std::filesystem::path& folder) {
  const quantize::QuantizedModel quantized = Widened(source);
  const std::string path = (folder / kWeights).string();
  RF_ASSIGN_OR_RETURN(const auto file, checkpoint::SafetensorsFile::Open(folder / kWeights));
  size_t count = KeptNames(base, quantized).size();
  for (const auto& [module, linear] : quantized.linears) {
    RF_RETURN_IF_ERROR(VerifyModule(*file, path, module, linear));
    count += linear.zeros.defined() ? 4 : 3;
  }
  return VerifyKept(base, quantized, *file, path, count);
}

}  // namespace refinery::exporting
