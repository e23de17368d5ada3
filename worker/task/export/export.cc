#include "worker/task/runtime/torch.h"

#include "worker/task/export/export.h"

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>

#include "common/files.h"
#include "worker/task/checkpoint/safetensors.h"
#include "worker/task/checkpoint/safetensors_writer.h"
#include "worker/task/export/folder_files.h"
#include "worker/task/model/config.h"
#include "worker/task/quantize/quantized_artifact.h"

namespace refinery::exporting {
namespace {

using Facts = std::vector<std::pair<std::string, std::string>>;

constexpr char kWeights[] = "model.safetensors";

// The names of `base` that are written as they are: all but quantized weights and the copy of tied embeddings.
std::vector<std::string> KeptNames(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized) {
  const bool tied = base.config().value("tie_word_embeddings", false);
  std::vector<std::string> kept;
  for (const std::string& name : base.Names()) {
    if (tied && name == "lm_head.weight") continue;
    constexpr std::string_view kSuffix = ".weight";
    if (name.ends_with(kSuffix) && quantized.linears.contains(name.substr(0, name.size() - kSuffix.size()))) continue;
    kept.push_back(name);
  }
  return kept;
}

nlohmann::json QuantizationConfig(const quantize::QuantizedModel& quantized) {
  const quantize::GptqSettings& s = quantized.settings;
  // transformers wants damp_percent strictly between 0 and 1; it plays no part in loading.
  const double damp = std::clamp(s.damp_fraction, 1e-6, 0.999);
  return {{"quant_method", "gptq"},
          {"checkpoint_format", "gptq"},
          {"bits", s.bits},
          {"group_size", s.group_size},
          {"desc_act", false},
          {"sym", true},
          {"lm_head", false},
          {"true_sequential", true},
          {"damp_percent", damp},
          {"pack_dtype", "int32"},
          {"meta",
           {{"quantizer", nlohmann::json::array({Join("refinery:", REFINERY_VERSION)})},
            {"act_group_aware", s.order == quantize::ColumnOrderKind::kGroups},
            {"calibration_digest", quantized.calibration_digest},
            {"calibration_tokens", quantized.calibration_tokens}}}};
}

// Whether these modules are exactly the linear layers of the base model, in shapes that the format can hold.
Status CheckModules(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized) {
  RF_ASSIGN_OR_RETURN(const model::ModelConfig config, model::ModelConfig::FromJson(base.config()));
  RF_RETURN_IF_ERROR(quantize::CheckGroupSize(config, quantized.settings.bits, quantized.settings.group_size));
  for (const auto& [module, linear] : quantized.linears) {
    if (!base.Has(module + ".weight")) {
      return InvalidArgument("the quantized module ", module, " is not in ", base.path().string());
    }
    RF_ASSIGN_OR_RETURN(const at::Tensor weight, base.Get(module + ".weight"));
    if (weight.sizes() != linear.codes.sizes()) {
      return InvalidArgument("the quantized module ", module, " has another shape than in ", base.path().string());
    }
  }
  // Loaders replace every linear layer of the blocks: one left out would not load.
  const size_t wanted = static_cast<size_t>(config.num_layers) * 7;
  if (quantized.linears.size() != wanted) {
    return InvalidArgument("the quantized artifact has ", quantized.linears.size(), " modules, ", base.path().string(),
                           " has ", wanted);
  }
  return absl::OkStatus();
}

double MeanError(const quantize::QuantizedModel& quantized, double quantize::GptqReport::* error) {
  double sum = 0;
  for (const auto& [module, report] : quantized.reports) sum += report.*error;
  return quantized.reports.empty() ? 0 : sum / static_cast<double>(quantized.reports.size());
}

std::string Percent(double fraction) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3f %%", 100 * fraction);
  return text;
}

Facts GptqFacts(const quantize::QuantizedModel& quantized) {
  const quantize::GptqSettings& s = quantized.settings;
  Facts facts = {{"bits", Join(s.bits)},
                 {"group size", s.group_size == -1 ? "one group a row" : Join(s.group_size)},
                 {"quantized weights", Join(quantize::QuantizedBytes(quantized), " bytes")}};
  if (quantized.calibration_tokens > 0) {
    facts.emplace_back("calibration tokens", Join(quantized.calibration_tokens));
    facts.emplace_back("mean output error of a layer", Percent(MeanError(quantized, &quantize::GptqReport::relative_error)));
    facts.emplace_back("the same with plain rounding",
                       Percent(MeanError(quantized, &quantize::GptqReport::rtn_relative_error)));
  }
  return facts;
}

bool SameBytes(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return false;
  const at::Tensor left = a.contiguous(), right = b.contiguous();
  return std::memcmp(left.const_data_ptr(), right.const_data_ptr(), left.nbytes()) == 0;
}

}  // namespace

Status ExportGptqFolder(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized, const ModelCard& card,
                        const std::filesystem::path& folder) {
  RF_RETURN_IF_ERROR(CheckModules(base, quantized));
  RF_RETURN_IF_ERROR(CreateFolders(folder));
  std::map<std::string, at::Tensor> tensors;
  for (const std::string& name : KeptNames(base, quantized)) {
    RF_ASSIGN_OR_RETURN(tensors[name], base.Get(name));
  }
  for (const auto& [module, linear] : quantized.linears) {
    const quantize::PackedGptq packed = quantize::PackGptqV1(linear);
    tensors[module + ".qweight"] = packed.qweight;
    tensors[module + ".qzeros"] = packed.qzeros;
    tensors[module + ".scales"] = packed.scales;
    tensors[module + ".g_idx"] = packed.g_idx;
  }
  RF_RETURN_IF_ERROR(checkpoint::WriteSafetensors(folder / kWeights, tensors));
  const nlohmann::json quantization = QuantizationConfig(quantized);
  nlohmann::json config = base.config();
  config["quantization_config"] = quantization;
  RF_RETURN_IF_ERROR(WriteFileAtomically(folder / "config.json", config.dump(2) + "\n"));
  RF_RETURN_IF_ERROR(WriteFileAtomically(folder / "quantize_config.json", quantization.dump(2) + "\n"));
  RF_RETURN_IF_ERROR(CopyCompanions(base.path(), folder));
  RF_RETURN_IF_ERROR(WriteModelCard(Kind::kGptq, card, GptqFacts(quantized), folder));
  RF_RETURN_IF_ERROR(VerifyGptqFolder(base, quantized, folder));
  return WriteManifest(folder);
}

Status VerifyGptqFolder(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized,
                        const std::filesystem::path& folder) {
  const std::string path = (folder / kWeights).string();
  RF_ASSIGN_OR_RETURN(const auto file, checkpoint::SafetensorsFile::Open(folder / kWeights));
  for (const auto& [module, linear] : quantized.linears) {
    RF_ASSIGN_OR_RETURN(const quantize::QuantizedLinear read,
                        quantize::ReadPackedLinear(*file, module, quantized.settings.bits, quantized.settings.group_size));
    if (!at::equal(read.codes, linear.codes) || !SameBytes(read.scales, linear.scales)) {
      return DataLoss(path, ": ", module, " does not read back as it was written");
    }
  }
  const std::vector<std::string> kept = KeptNames(base, quantized);
  for (const std::string& name : kept) {
    RF_ASSIGN_OR_RETURN(const at::Tensor read, file->Get(name));
    RF_ASSIGN_OR_RETURN(const at::Tensor wanted, base.Get(name));
    if (!SameBytes(read, wanted)) return DataLoss(path, ": ", name, " does not read back as it was written");
  }
  const size_t count = kept.size() + 4 * quantized.linears.size();
  if (file->tensors().size() != count) return DataLoss(path, ": holds ", file->tensors().size(), " tensors, not ", count);
  return absl::OkStatus();
}

Status ExportAdapterFolder(const checkpoint::PeftAdapter& adapter, const ModelCard& card, const std::filesystem::path& folder) {
  RF_RETURN_IF_ERROR(CreateFolders(folder));
  RF_RETURN_IF_ERROR(checkpoint::SavePeftAdapter(adapter, folder));
  RF_ASSIGN_OR_RETURN(const checkpoint::PeftAdapter read, checkpoint::LoadPeftAdapter(folder));
  if (read.pairs.size() != adapter.pairs.size() || read.scale() != adapter.scale()) {
    return DataLoss(folder.string(), ": the adapter does not read back as it was written");
  }
  for (const auto& [module, pair] : adapter.pairs) {
    const auto found = read.pairs.find(module);
    if (found == read.pairs.end() || !SameBytes(found->second.a, pair.a.to(at::kFloat).cpu()) ||
        !SameBytes(found->second.b, pair.b.to(at::kFloat).cpu())) {
      return DataLoss(folder.string(), ": ", module, " does not read back as it was written");
    }
  }
  const Facts facts = {{"rank", Join(adapter.rank)}, {"lora_alpha", Join(adapter.lora_alpha)},
                       {"modules", Join(adapter.pairs.size())}};
  RF_RETURN_IF_ERROR(WriteModelCard(Kind::kAdapter, card, facts, folder));
  return WriteManifest(folder);
}

}  // namespace refinery::exporting
