#include "worker/task/runtime/torch.h"

#include "worker/task/quantize/quantized_artifact.h"

#include <functional>
#include <string_view>
#include <utility>

#include "common/digest.h"
#include "common/files.h"
#include "worker/task/checkpoint/safetensors_writer.h"

namespace refinery::quantize {
namespace {

constexpr char kTensorFile[] = "quantized.safetensors";
constexpr char kNormFile[] = "norms.safetensors";
constexpr char kFactsFile[] = "quantized.json";
constexpr int kFormat = 2;

constexpr std::pair<Grid, const char*> kGrids[] = {
    {Grid::kFullRange, "full_range"}, {Grid::kSymmetric, "symmetric"}, {Grid::kAsymmetric, "asymmetric"}};
constexpr std::pair<ColumnOrderKind, const char*> kOrders[] = {
    {ColumnOrderKind::kGroups, "groups"}, {ColumnOrderKind::kNatural, "natural"}, {ColumnOrderKind::kClassic, "classic"}};

nlohmann::json ModuleJson(const ModuleShape& shape, const GptqReport& report) {
  nlohmann::json json = ReportToJson(report);
  json.update({{"in", shape.in}, {"out", shape.out}, {"bits", shape.bits}, {"group_size", shape.group_size}});
  return json;
}

// Writes both files; `read` gives one module at a time.
Status WriteArtifact(const QuantizedModel& quantized, const std::map<std::string, ModuleShape>& shapes,
                     const std::function<StatusOr<QuantizedLinear>(const std::string&)>& read, const std::filesystem::path& folder) {
  std::map<std::string, checkpoint::TensorSpec> specs;
  nlohmann::json modules = nlohmann::json::object();
  for (const auto& [module, s] : shapes) {
    const int64_t groups = (s.in + s.group_size - 1) / s.group_size;
    specs[module + ".qweight"] = {.dtype = at::kInt, .shape = {s.in / 32 * s.bits, s.out}};
    specs[module + ".qzeros"] = {.dtype = at::kInt, .shape = {groups, s.out / 32 * s.bits}};
    specs[module + ".scales"] = {.dtype = at::kHalf, .shape = {groups, s.out}};
    specs[module + ".g_idx"] = {.dtype = at::kInt, .shape = {s.in}};
    const auto report = quantized.reports.find(module);
    modules[module] = ModuleJson(s, report == quantized.reports.end() ? GptqReport{} : report->second);
  }
  RF_ASSIGN_OR_RETURN(const auto writer, checkpoint::SafetensorsWriter::Create(folder / kTensorFile, specs, {{"format", "pt"}}));
  std::string current;
  std::map<std::string, at::Tensor> tensors;
  for (const auto& [name, spec] : specs) {
    const std::string module = name.substr(0, name.rfind('.'));
    if (module != current) {
      RF_ASSIGN_OR_RETURN(const QuantizedLinear linear, read(module));
      const PackedGptq packed = PackGptqV1(linear);
      tensors = {{"qweight", packed.qweight}, {"qzeros", packed.qzeros}, {"scales", packed.scales}, {"g_idx", packed.g_idx}};
      current = module;
    }
    const at::Tensor bytes = tensors.at(name.substr(module.size() + 1)).contiguous();
    RF_RETURN_IF_ERROR(writer->Append({static_cast<const char*>(bytes.const_data_ptr()), bytes.nbytes()}));
  }
  RF_RETURN_IF_ERROR(writer->Finish());
  const GptqSettings& s = quantized.settings;
  nlohmann::json calibration = quantized.calibration_facts.is_object() ? quantized.calibration_facts : nlohmann::json::object();
  calibration.update({{"digest", quantized.calibration_digest}, {"tokens", quantized.calibration_tokens}});
  nlohmann::json facts = SettingsToJson(s);
  facts.update({{"format", kFormat}, {"calibration", std::move(calibration)}, {"modules", std::move(modules)}});
  if (quantized.budget.is_object()) facts["budget"] = quantized.budget;
  if (quantized.recovery.is_object()) facts["recovery"] = quantized.recovery;
  if (!quantized.norms.empty()) {
    facts["norms"] = nlohmann::json::array();
    for (const auto& [name, norm] : quantized.norms) facts["norms"].push_back(name);
    RF_RETURN_IF_ERROR(checkpoint::WriteSafetensors(folder / kNormFile, quantized.norms));
  }
  return WriteFileAtomically(folder / kFactsFile, facts.dump(1) + "\n");
}

// Fills settings and reports; throws nlohmann::json::exception for a missing or wrongly typed field.
void FactsFromJson(const nlohmann::json& facts, QuantizedModel* quantized, std::map<std::string, ModuleShape>* shapes) {
  quantized->settings = SettingsFromJson(facts);
  facts.at("calibration").at("digest").get_to(quantized->calibration_digest);
  facts.at("calibration").at("tokens").get_to(quantized->calibration_tokens);
  quantized->calibration_facts = facts.at("calibration");
  for (const char* key : {"digest", "tokens"}) quantized->calibration_facts.erase(key);
  if (facts.contains("budget")) quantized->budget = facts.at("budget");
  if (facts.contains("recovery")) quantized->recovery = facts.at("recovery");
  for (const nlohmann::json& name : facts.value("norms", nlohmann::json::array())) quantized->norms.try_emplace(name.get<std::string>());
  for (const auto& [module, entry] : facts.at("modules").items()) {
    quantized->reports[module] = ReportFromJson(entry);
    // Format 1 had one width for all.
    ModuleShape shape{.bits = quantized->settings.bits, .group_size = quantized->settings.group_size};
    if (entry.contains("bits")) entry.at("bits").get_to(shape.bits);
    if (entry.contains("group_size")) entry.at("group_size").get_to(shape.group_size);
    (*shapes)[module] = shape;
  }
}

bool IsWidth(int64_t bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; }

Status ParseFacts(const std::filesystem::path& path, const std::string& text, QuantizedModel* quantized,
                  std::map<std::string, ModuleShape>* shapes) try {
  const nlohmann::json facts = nlohmann::json::parse(text);
  const int format = facts.at("format").get<int>();
  if (format < 1 || format > kFormat) {
    return InvalidArgument(path.string(), ": format ", format, " is not known to this version (", kFormat, ")");
  }
  FactsFromJson(facts, quantized, shapes);
  const GptqSettings& s = quantized->settings;
  if (!IsWidth(s.bits) || (s.group_size != -1 && s.group_size <= 0)) {
    return DataLoss(path.string(), ": impossible settings: ", s.bits, " bits, group size ", s.group_size);
  }
  for (const auto& [module, shape] : *shapes) {
    if (IsWidth(shape.bits) && (shape.group_size == -1 || shape.group_size > 0)) continue;
    return DataLoss(path.string(), ": impossible settings of ", module, ": ", shape.bits, " bits, group size ", shape.group_size);
  }
  return absl::OkStatus();
} catch (const nlohmann::json::exception& e) {
  return DataLoss(path.string(), ": ", e.what());
}

}  // namespace

const char* GridName(Grid grid) {
  for (const auto& [value, name] : kGrids) {
    if (value == grid) return name;
  }
  return "";
}

const char* OrderName(ColumnOrderKind order) {
  for (const auto& [value, name] : kOrders) {
    if (value == order) return name;
  }
  return "";
}

std::optional<Grid> GridFromName(std::string_view name) {
  for (const auto& [value, known] : kGrids) {
    if (name == known) return value;
  }
  return std::nullopt;
}

std::optional<ColumnOrderKind> OrderFromName(std::string_view name) {
  for (const auto& [value, known] : kOrders) {
    if (name == known) return value;
  }
  return std::nullopt;
}

nlohmann::json SettingsToJson(const GptqSettings& s) {
  return {{"bits", s.bits}, {"group_size", s.group_size}, {"damp_fraction", s.damp_fraction}, {"grid", GridName(s.grid)},
          {"order", OrderName(s.order)}, {"alpha", s.alpha}, {"refine_sweeps", s.refine_sweeps}};
}

GptqSettings SettingsFromJson(const nlohmann::json& json) {
  GptqSettings settings;
  json.at("bits").get_to(settings.bits);
  json.at("group_size").get_to(settings.group_size);
  json.at("damp_fraction").get_to(settings.damp_fraction);
  if (json.at("format").get<int>() == 1) {
    settings.order = json.at("order_groups").get<bool>() ? ColumnOrderKind::kGroups : ColumnOrderKind::kNatural;
    return settings;
  }
  const std::string grid = json.at("grid").get<std::string>(), order = json.at("order").get<std::string>();
  if (!GridFromName(grid) || !OrderFromName(order)) {
    throw nlohmann::json::other_error::create(501, Join("no known grid and order: '", grid, "', '", order, "'"), &json);
  }
  settings.grid = *GridFromName(grid);
  settings.order = *OrderFromName(order);
  json.at("alpha").get_to(settings.alpha);
  json.at("refine_sweeps").get_to(settings.refine_sweeps);
  return settings;
}

Status SaveQuantized(const QuantizedModel& quantized, const std::filesystem::path& folder) {
  std::map<std::string, ModuleShape> shapes;
  for (const auto& [module, linear] : quantized.linears) {
    shapes[module] = {.out = linear.codes.size(0), .in = linear.codes.size(1), .bits = linear.bits, .group_size = linear.group_size};
  }
  return WriteArtifact(
      quantized, shapes, [&](const std::string& module) -> StatusOr<QuantizedLinear> { return quantized.linears.at(module); }, folder);
}

Status SaveQuantized(const QuantizedModel& quantized, Journal& journal, const std::filesystem::path& folder,
                     runtime::Reporter& reporter) {
  std::map<std::string, ModuleShape> shapes;
  for (const auto& [module, report] : quantized.reports) {
    RF_ASSIGN_OR_RETURN(shapes[module], journal.Shape(module));
  }
  const auto read = [&](const std::string& module) -> StatusOr<QuantizedLinear> {
    RF_ASSIGN_OR_RETURN(std::optional<JournalEntry> entry, journal.Read(module, reporter));
    if (!entry) return DataLoss(journal.folder().string(), ": module ", module, " was there and is damaged now");
    return std::move(entry->linear);
  };
  return WriteArtifact(quantized, shapes, read, folder);
}

StatusOr<QuantizedLinear> ReadPackedLinear(const checkpoint::SafetensorsFile& file, const std::string& module,
                                           const PackedLayout& layout) {
  PackedGptq packed;
  RF_ASSIGN_OR_RETURN(packed.qweight, file.Get(module + ".qweight"));
  RF_ASSIGN_OR_RETURN(packed.qzeros, file.Get(module + ".qzeros"));
  RF_ASSIGN_OR_RETURN(packed.scales, file.Get(module + ".scales"));
  RF_ASSIGN_OR_RETURN(packed.g_idx, file.Get(module + ".g_idx"));
  const std::string problem = PackedProblem(packed, layout);
  if (!problem.empty()) return DataLoss(module, ": ", problem);
  return UnpackGptq(packed, layout);
}

StatusOr<QuantizedModel> LoadQuantized(const std::filesystem::path& folder) {
  QuantizedModel quantized;
  RF_ASSIGN_OR_RETURN(const std::string text, ReadFile(folder / kFactsFile));
  std::map<std::string, ModuleShape> shapes;
  RF_RETURN_IF_ERROR(ParseFacts(folder / kFactsFile, text, &quantized, &shapes));
  RF_ASSIGN_OR_RETURN(const auto file, checkpoint::SafetensorsFile::Open(folder / kTensorFile));
  for (const auto& [module, report] : quantized.reports) {
    const ModuleShape& shape = shapes.at(module);
    StatusOr<QuantizedLinear> linear =
        ReadPackedLinear(*file, module,
                         {.bits = shape.bits,
                          .group_size = shape.group_size,
                          .symmetric = quantized.settings.grid != Grid::kAsymmetric,
                          .natural_groups = quantized.settings.order != ColumnOrderKind::kClassic});
    if (!linear.ok()) {
      return DataLoss((folder / kTensorFile).string(), ": ", Message(linear.status()), "; fetch the artifact again");
    }
    quantized.linears[module] = *std::move(linear);
  }
  if (quantized.norms.empty()) return quantized;
  RF_ASSIGN_OR_RETURN(const auto norms, checkpoint::SafetensorsFile::Open(folder / kNormFile));
  for (auto& [name, norm] : quantized.norms) {
    RF_ASSIGN_OR_RETURN(norm, norms->Get(name));
  }
  return quantized;
}

// Replaces, never writes into: another model may share the base's.
static Status ApplyNorms(model::CausalLm& model, const std::map<std::string, at::Tensor>& norms) {
  std::map<std::string, at::Tensor*> places = {{"model.norm.weight", &model.final_norm}};
  for (size_t i = 0; i < model.layers.size(); ++i) {
    model::DecoderLayer& layer = model.layers[i];
    const std::string prefix = Join("model.layers.", i, ".");
    places[prefix + "input_layernorm.weight"] = &layer.input_norm;
    places[prefix + "post_attention_layernorm.weight"] = &layer.post_attention_norm;
    if (!layer.q_norm.defined()) continue;
    places[prefix + "self_attn.q_norm.weight"] = &layer.q_norm;
    places[prefix + "self_attn.k_norm.weight"] = &layer.k_norm;
  }
  for (const auto& [name, norm] : norms) {
    const auto place = places.find(name);
    if (place == places.end() || place->second->sizes() != norm.sizes() || !at::isFloatingType(norm.scalar_type())) {
      return InvalidArgument("the quantized artifact's norm ", name, " does not fit the model: it was made from another model");
    }
  }
  for (const auto& [name, norm] : norms) *places.at(name) = norm.to(places.at(name)->options()).contiguous();
  return absl::OkStatus();
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
  RF_RETURN_IF_ERROR(ApplyNorms(model, quantized.norms));
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
      if (q.group_size % model::PackedWeight::kGroupUnit != 0 || q.group_index.defined()) continue;
      const auto middle = static_cast<double>(int64_t{1} << (q.bits - 1));
      const at::Tensor offsets = q.zeros.defined() ? middle - q.zeros.to(at::kFloat) : at::Tensor();
      linear->packed = model::PackedWeight::FromCodes(q.codes, q.scales, offsets, q.bits, q.group_size, arena);
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
