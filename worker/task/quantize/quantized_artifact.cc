#include "worker/task/runtime/torch.h"

#include "worker/task/quantize/quantized_artifact.h"

#include <nlohmann/json.hpp>
#include <string_view>

#include "common/digest.h"
#include "common/files.h"

namespace refinery::quantize {
namespace {

constexpr char kTensorFile[] = "quantized.safetensors";
constexpr char kFactsFile[] = "quantized.json";
constexpr int kFormat = 1;

nlohmann::json ReportJson(const QuantizedLinear& linear, const GptqReport& report) {
  return {{"in", linear.codes.size(1)},
          {"out", linear.codes.size(0)},
          {"relative_error", report.relative_error},
          {"rtn_relative_error", report.rtn_relative_error},
          {"damp_fraction", report.damp_fraction},
          {"dead_columns", report.dead_columns},
          {"notes", report.notes}};
}

// Fills settings and reports; throws nlohmann::json::exception for a missing or wrongly typed field.
void FactsFromJson(const nlohmann::json& facts, QuantizedModel* quantized) {
  facts.at("bits").get_to(quantized->settings.bits);
  facts.at("group_size").get_to(quantized->settings.group_size);
  facts.at("damp_fraction").get_to(quantized->settings.damp_fraction);
  quantized->settings.order = facts.at("order_groups").get<bool>() ? ColumnOrderKind::kGroups : ColumnOrderKind::kNatural;
  facts.at("calibration").at("digest").get_to(quantized->calibration_digest);
  facts.at("calibration").at("tokens").get_to(quantized->calibration_tokens);
  for (const auto& [module, entry] : facts.at("modules").items()) {
    GptqReport& report = quantized->reports[module];
    entry.at("relative_error").get_to(report.relative_error);
    entry.at("rtn_relative_error").get_to(report.rtn_relative_error);
    entry.at("damp_fraction").get_to(report.damp_fraction);
    entry.at("dead_columns").get_to(report.dead_columns);
    entry.at("notes").get_to(report.notes);
  }
}

Status ParseFacts(const std::filesystem::path& path, const std::string& text, QuantizedModel* quantized) try {
  const nlohmann::json facts = nlohmann::json::parse(text);
  if (facts.at("format").get<int>() != kFormat) {
    return InvalidArgument(path.string(), ": format ", facts.at("format").get<int>(), " is not known to this version (",
                           kFormat, ")");
  }
  FactsFromJson(facts, quantized);
  const GptqSettings& s = quantized->settings;
  if ((s.bits != 2 && s.bits != 3 && s.bits != 4 && s.bits != 8) || (s.group_size != -1 && s.group_size <= 0)) {
    return DataLoss(path.string(), ": impossible settings: ", s.bits, " bits, group size ", s.group_size);
  }
  return absl::OkStatus();
} catch (const nlohmann::json::exception& e) {
  return DataLoss(path.string(), ": ", e.what());
}

}  // namespace

Status SaveQuantized(const QuantizedModel& quantized, const std::filesystem::path& folder) {
  RF_RETURN_IF_ERROR(CreateFolders(folder));
  std::map<std::string, at::Tensor> tensors;
  nlohmann::json modules = nlohmann::json::object();
  for (const auto& [module, linear] : quantized.linears) {
    const PackedGptq packed = PackGptqV1(linear);
    tensors[module + ".qweight"] = packed.qweight;
    tensors[module + ".qzeros"] = packed.qzeros;
    tensors[module + ".scales"] = packed.scales;
    tensors[module + ".g_idx"] = packed.g_idx;
    const auto report = quantized.reports.find(module);
    modules[module] = ReportJson(linear, report == quantized.reports.end() ? GptqReport{} : report->second);
  }
  const GptqSettings& s = quantized.settings;
  const nlohmann::json facts = {
      {"format", kFormat}, {"bits", s.bits}, {"group_size", s.group_size}, {"damp_fraction", s.damp_fraction},
      {"order_groups", s.order == ColumnOrderKind::kGroups},
      {"calibration", {{"digest", quantized.calibration_digest}, {"tokens", quantized.calibration_tokens}}},
      {"modules", std::move(modules)}};
  RF_RETURN_IF_ERROR(checkpoint::WriteSafetensors(folder / kTensorFile, tensors));
  return WriteFileAtomically(folder / kFactsFile, facts.dump(1) + "\n");
}

StatusOr<QuantizedLinear> ReadPackedLinear(const checkpoint::SafetensorsFile& file, const std::string& module, int64_t bits,
                                           int64_t group_size) {
  PackedGptq packed;
  RF_ASSIGN_OR_RETURN(packed.qweight, file.Get(module + ".qweight"));
  RF_ASSIGN_OR_RETURN(packed.qzeros, file.Get(module + ".qzeros"));
  RF_ASSIGN_OR_RETURN(packed.scales, file.Get(module + ".scales"));
  RF_ASSIGN_OR_RETURN(packed.g_idx, file.Get(module + ".g_idx"));
  const std::string problem = PackedProblem(packed, bits, group_size);
  if (!problem.empty()) return DataLoss(module, ": ", problem);
  return UnpackGptqV1(packed, bits, group_size);
}

StatusOr<QuantizedModel> LoadQuantized(const std::filesystem::path& folder) {
  QuantizedModel quantized;
  RF_ASSIGN_OR_RETURN(const std::string text, ReadFile(folder / kFactsFile));
  RF_RETURN_IF_ERROR(ParseFacts(folder / kFactsFile, text, &quantized));
  RF_ASSIGN_OR_RETURN(const auto file, checkpoint::SafetensorsFile::Open(folder / kTensorFile));
  for (const auto& [module, report] : quantized.reports) {
    StatusOr<QuantizedLinear> linear =
        ReadPackedLinear(*file, module, quantized.settings.bits, quantized.settings.group_size);
    if (!linear.ok()) {
      return DataLoss((folder / kTensorFile).string(), ": ", Message(linear.status()), "; fetch the artifact again");
    }
    quantized.linears[module] = *std::move(linear);
  }
  return quantized;
}

Status ApplyQuantized(model::CausalLm& model, const QuantizedModel& quantized) {
  size_t wanted = 0;
  for (model::DecoderLayer& layer : model.layers) {
    for (const model::Linear* linear : layer.Linears()) {
      ++wanted;
      const auto found = quantized.linears.find(linear->name);
      if (found == quantized.linears.end()) {
        return InvalidArgument("the quantized artifact has no ", linear->name, ": it was made from another model");
      }
      if (found->second.codes.sizes() != linear->weight.sizes()) {
        return InvalidArgument("the quantized artifact's ", linear->name, " is ", found->second.codes.size(0), " x ",
                               found->second.codes.size(1), ", the model's ", linear->weight.size(0), " x ",
                               linear->weight.size(1));
      }
    }
  }
  if (wanted != quantized.linears.size()) {
    return InvalidArgument("the quantized artifact has ", quantized.linears.size(), " modules, the model ", wanted);
  }
  const at::NoGradGuard no_grad;
  for (model::DecoderLayer& layer : model.layers) {
    for (model::Linear* linear : layer.Linears()) linear->weight.copy_(quantized.linears.at(linear->name).Dequantize());
  }
  return absl::OkStatus();
}

void PackQuantized(model::CausalLm& model, const QuantizedModel& quantized) {
  model::WeightArena arena;
  for (model::DecoderLayer& layer : model.layers) {
    for (model::Linear* linear : layer.Linears()) {
      const QuantizedLinear& q = quantized.linears.at(linear->name);
      if (q.group_size % model::PackedWeight::kGroupUnit != 0) continue;
      linear->packed = model::PackedWeight::FromCodes(q.codes, q.scales, {}, q.bits, q.group_size, arena);
      linear->weight.reset();
    }
  }
}

std::string CalibrationDigest(const std::vector<std::vector<int32_t>>& sequences) {
  Sha256 hash;
  std::string bytes;
  const auto append = [&bytes](int64_t value) {
    for (int i = 0; i < 8; ++i) bytes += static_cast<char>(static_cast<uint64_t>(value) >> (8 * i) & 0xFF);
  };
  for (const std::vector<int32_t>& sequence : sequences) {
    bytes.clear();
    append(static_cast<int64_t>(sequence.size()));
    for (const int32_t id : sequence) append(id);
    hash.Update(bytes);
  }
  return hash.Finish();
}

int64_t QuantizedBytes(const QuantizedModel& quantized) {
  int64_t bits = 0;
  for (const auto& [module, linear] : quantized.linears) {
    bits += linear.codes.numel() * linear.bits + linear.scales.numel() * (16 + linear.bits);
  }
  return bits / 8;
}

}  // namespace refinery::quantize
