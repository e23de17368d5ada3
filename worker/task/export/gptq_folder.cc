#include "worker/task/runtime/torch.h"

#include <algorithm>
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

using quantize::PackedGptq;
using quantize::QuantizedLinear;

constexpr char kWeights[] = "model.safetensors";

// The layers whose width or group size is not the model's own, as GPTQModel and vLLM read it: {"+:<regex>": {"bits", ...}},
// matched from the beginning of a module's name. q, k and v (gate and up) of a layer also match under the name that vLLM joins
// them to.
nlohmann::json DynamicOverrides(const quantize::QuantizedModel& quantized) {
  std::map<std::tuple<std::string, int64_t, int64_t>, std::string> layers;  // (suffix, bits, group size) -> "0|3|7"
  for (const auto& [module, linear] : quantized.linears) {
    const bool whole_row = quantized.settings.group_size == -1 && linear.group_size == linear.codes.size(1);
    const int64_t group_size = whole_row ? -1 : linear.group_size;
    if (linear.bits == quantized.settings.bits && group_size == quantized.settings.group_size) continue;
    constexpr std::string_view kPrefix = "model.layers.";
    const size_t dot = module.find('.', kPrefix.size());
    if (!module.starts_with(kPrefix) || dot == std::string::npos) {
      layers[{module, linear.bits, group_size}] = "";
      continue;
    }
    std::string& numbers = layers[{module.substr(dot + 1), linear.bits, group_size}];
    numbers += (numbers.empty() ? "" : "|") + module.substr(kPrefix.size(), dot - kPrefix.size());
  }
  nlohmann::json dynamic = nlohmann::json::object();
  const std::map<std::string, std::string> fused = {{"self_attn.q_proj", "self_attn\\.(?:q_proj|qkv_proj)"},
                                                    {"mlp.gate_proj", "mlp\\.(?:gate_proj|gate_up_proj)"}};
  for (const auto& [key, numbers] : layers) {
    const auto& [suffix, bits, group_size] = key;
    std::string escaped;
    for (const char c : suffix) escaped += c == '.' ? std::string("\\.") : std::string(1, c);
    if (const auto found = fused.find(suffix); found != fused.end()) escaped = found->second;
    const std::string pattern = numbers.empty() ? escaped : Join("model\\.layers\\.(?:", numbers, ")\\.", escaped);
    dynamic[Join("+:", pattern, "$")] = {{"bits", bits}, {"group_size", group_size}};
  }
  return dynamic;
}

nlohmann::json QuantizationConfig(const quantize::QuantizedModel& quantized, Format format) {
  const quantize::GptqSettings& s = quantized.settings;
  const QuantSettings found = SettingsOf(quantized);
  // transformers wants damp_percent strictly between 0 and 1; it plays no part in loading.
  const double damp = std::clamp(s.damp_fraction, 1e-6, 0.999);
  nlohmann::json meta = Provenance(quantized);
  meta["act_group_aware"] = s.order == quantize::ColumnOrderKind::kGroups;
  // Old v1 files with zero points were off by one; gptqmodel takes this entry as word that these are not.
  if (!found.symmetric && format == Format::kGptq) meta["quantizer"].push_back("gptqmodel:0.9.0");
  nlohmann::json config = {{"quant_method", "gptq"},
                           {"checkpoint_format", FormatName(format)},
                           {"bits", s.bits},
                           {"group_size", s.group_size},
                           {"desc_act", found.act_order},
                           {"sym", found.symmetric},
                           {"lm_head", found.head},
                           {"true_sequential", true},
                           {"damp_percent", damp},
                           {"pack_dtype", "int32"},
                           {"meta", std::move(meta)}};
  if (nlohmann::json dynamic = DynamicOverrides(quantized); !dynamic.empty()) config["dynamic"] = std::move(dynamic);
  return config;
}

PackedGptq Pack(const QuantizedLinear& linear, Format format) {
  return format == Format::kGptqV2 ? quantize::PackGptqV2(linear) : quantize::PackGptqV1(linear);
}

// The four tensors of a module, packed when the first of them is written and kept until the last one is.
void AddPacked(const std::string& module, const QuantizedLinear& linear, Format format, LazyTensors* tensors) {
  const int64_t out = linear.codes.size(0), in = linear.codes.size(1), groups = linear.scales.size(1), bits = linear.bits;
  const auto packed = std::make_shared<PackedGptq>();
  const auto part = [&](const char* name, at::ScalarType dtype, std::vector<int64_t> shape, at::Tensor PackedGptq::*member) {
    (*tensors)[module + name] = {.spec = {.dtype = dtype, .shape = std::move(shape)},
                                 .make = [packed, &linear, format, member]() -> StatusOr<at::Tensor> {
                                   if (!((*packed).*member).defined()) *packed = Pack(linear, format);
                                   return std::exchange((*packed).*member, at::Tensor());
                                 }};
  };
  part(".g_idx", at::kInt, {in}, &PackedGptq::g_idx);
  part(".qweight", at::kInt, {in * bits / 32, out}, &PackedGptq::qweight);
  part(".qzeros", at::kInt, {groups, out * bits / 32}, &PackedGptq::qzeros);
  part(".scales", at::kHalf, {groups, out}, &PackedGptq::scales);
}

at::Tensor GroupIndexOf(const QuantizedLinear& linear) {
  if (linear.group_index.defined()) return linear.group_index.cpu().to(at::kInt);
  return at::arange(linear.codes.size(1), at::kInt).floor_divide(linear.group_size).to(at::kInt);
}

// By the reader of checkpoints, which shares nothing with the packer.
Status VerifyModule(const checkpoint::SafetensorsFile& file, const std::string& path, const std::string& module,
                    const QuantizedLinear& linear, Format format) {
  checkpoint::GptqTensors tensors;
  RF_ASSIGN_OR_RETURN(tensors.qweight, file.Get(module + ".qweight"));
  RF_ASSIGN_OR_RETURN(tensors.qzeros, file.Get(module + ".qzeros"));
  RF_ASSIGN_OR_RETURN(tensors.scales, file.Get(module + ".scales"));
  RF_ASSIGN_OR_RETURN(tensors.g_idx, file.Get(module + ".g_idx"));
  const checkpoint::GptqFormat stored{.bits = linear.bits, .group_size = linear.group_size,
                                      .zeros_minus_one = format == Format::kGptq};
  RF_ASSIGN_OR_RETURN(const checkpoint::GptqCodes read, checkpoint::UnpackGptq(tensors, stored));
  if (!SameBytes(tensors.g_idx, GroupIndexOf(linear)))
    return DataLoss(path, ": g_idx of ", module, " does not read back as it was written");
  return CompareCodes(path, module, linear, read.codes, tensors.scales.t().contiguous(), read.zeros);
}

}  // namespace

Status ExportGptqFolder(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized, const ModelCard& card,
                        const std::filesystem::path& folder, Format format) {
  RF_RETURN_IF_ERROR(CheckModules(base, quantized, format));
  return WriteWholeFolder(folder, [&](const std::filesystem::path& partial) -> Status {
    LazyTensors tensors;
    RF_RETURN_IF_ERROR(AddKept(base, quantized, &tensors));
    for (const auto& [module, linear] : quantized.linears) AddPacked(module, linear, format, &tensors);
    RF_RETURN_IF_ERROR(WriteLazyTensors(partial / kWeights, tensors));
    const nlohmann::json quantization = QuantizationConfig(quantized, format);
    nlohmann::json config = base.config();
    config["quantization_config"] = quantization;
    RF_RETURN_IF_ERROR(WriteFileAtomically(partial / "config.json", config.dump(2) + "\n"));
    RF_RETURN_IF_ERROR(WriteFileAtomically(partial / "quantize_config.json", quantization.dump(2) + "\n"));
    RF_RETURN_IF_ERROR(CopyCompanions(base.path(), partial));
    RF_RETURN_IF_ERROR(WriteModelCard(Kind::kGptq, card, QuantizedFacts(quantized), partial, !SettingsOf(quantized).mixed.empty()));
    RF_RETURN_IF_ERROR(VerifyGptqFolder(base, quantized, partial, format));
    RF_ASSIGN_OR_RETURN(const ModelBytes bytes, MeasureFolder(quantized, partial));
    return WriteManifest(partial, &bytes);
  });
}

Status VerifyGptqFolder(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized,
                        const std::filesystem::path& folder, Format format) {
  const std::string path = (folder / kWeights).string();
  RF_ASSIGN_OR_RETURN(const auto file, checkpoint::SafetensorsFile::Open(folder / kWeights));
  for (const auto& [module, linear] : quantized.linears)
    RF_RETURN_IF_ERROR(VerifyModule(*file, path, module, linear, format));
  return VerifyKept(base, quantized, *file, path, KeptNames(base, quantized).size() + 4 * quantized.linears.size());
}

}  // namespace refinery::exporting
