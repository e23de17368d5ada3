#include "worker/task/runtime/torch.h"
//
#include "worker/task/checkpoint/peft_adapter.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "common/files.h"
#include "worker/task/checkpoint/safetensors.h"

namespace refinery::checkpoint {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxConfigBytes = uint64_t{4} << 20;
constexpr char kPrefix[] = "base_model.model.";
constexpr char kSuffixA[] = ".lora_A.weight";
constexpr char kSuffixB[] = ".lora_B.weight";

bool Flag(const json& config, const char* key) {
  auto found = config.find(key);
  return found != config.end() && found->is_boolean() && found->get<bool>();
}

bool IsSet(const json& config, const char* key) {
  auto found = config.find(key);
  return found != config.end() && !found->is_null() && !found->empty();
}

// What the adapter holds beyond plain LoRA; merging it as plain LoRA would be silently wrong.
Status CheckIsPlainLora(const json& config, const std::string& file) {
  if (config.value("peft_type", json()) != "LORA") return InvalidArgument(file, ": peft_type is not \"LORA\"");
  for (const char* key : {"use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora"})
    if (Flag(config, key)) return InvalidArgument(file, ": ", key, " is not supported; train a plain LoRA adapter");
  for (const char* key : {"rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "target_parameters",
                          "trainable_token_indices"})
    if (IsSet(config, key)) return InvalidArgument(file, ": ", key, " is not supported; train a plain LoRA adapter");
  json bias = config.value("bias", json("none"));
  if (bias != "none") return InvalidArgument(file, ": bias other than \"none\" is not supported");
  return absl::OkStatus();
}

bool TakeSuffix(std::string_view name, std::string_view suffix, std::string* module) {
  if (name.size() <= suffix.size() || name.substr(name.size() - suffix.size()) != suffix) return false;
  *module = std::string(name.substr(0, name.size() - suffix.size()));
  return true;
}

Status CheckPair(const std::string& file, const std::string& module, const LoraPair& pair, int64_t rank) {
  if (!pair.a.defined() || !pair.b.defined())
    return DataLoss(file, ": ", module, " lacks ", pair.a.defined() ? "lora_B" : "lora_A");
  if (pair.a.dim() != 2 || pair.b.dim() != 2 || pair.a.size(0) != rank || pair.b.size(1) != rank)
    return DataLoss(file, ": the factors of ", module, " do not have rank ", rank, " as adapter_config.json says");
  return absl::OkStatus();
}

// Module names for target_modules: the last components where every layer has the same set, else the full names, because
// PEFT matches a bare component in every layer.
json TargetModules(const std::map<std::string, LoraPair>& pairs) {
  std::map<std::string, std::set<std::string>> components_of_parent;
  std::set<std::string> components;
  for (const auto& [module, pair] : pairs) {
    size_t dot = module.rfind('.');
    std::string component = dot == std::string::npos ? module : module.substr(dot + 1);
    // "model.layers.3.self_attn" -> kind of parent "self_attn"; layers of one kind are compared with each other.
    std::string parent = dot == std::string::npos ? "" : module.substr(0, dot);
    components_of_parent[parent].insert(component);
    components.insert(component);
  }
  std::map<std::string, std::set<std::string>> expected;
  bool uniform = true;
  for (const auto& [parent, own] : components_of_parent) {
    std::string kind = parent.substr(parent.rfind('.') + 1);
    auto [entry, inserted] = expected.emplace(kind, own);
    if (!inserted && entry->second != own) uniform = false;
  }
  json names = json::array();
  if (uniform) {
    for (const std::string& component : components) names.push_back(component);
  } else {
    for (const auto& [module, pair] : pairs) names.push_back(module);
  }
  return names;
}

}  // namespace

json PeftAdapterConfig(const PeftAdapter& adapter) {
  // The keys that every release of PEFT understands; see PEFT's LoraConfig. Sorted by nlohmann::json.
  return {{"peft_type", "LORA"},
          {"task_type", "CAUSAL_LM"},
          {"base_model_name_or_path", adapter.base_model},
          {"revision", nullptr},
          {"inference_mode", true},
          {"auto_mapping", nullptr},
          {"r", adapter.rank},
          {"lora_alpha", adapter.lora_alpha},
          {"lora_dropout", 0.0},
          {"target_modules", TargetModules(adapter.pairs)},
          {"fan_in_fan_out", false},
          {"bias", "none"},
          {"modules_to_save", nullptr},
          {"init_lora_weights", true},
          {"layers_to_transform", nullptr},
          {"layers_pattern", nullptr},
          {"rank_pattern", json::object()},
          {"alpha_pattern", json::object()},
          {"use_rslora", false},
          {"use_dora", false},
          {"loftq_config", json::object()},
          {"megatron_config", nullptr},
          {"megatron_core", "megatron.core"}};
}

StatusOr<PeftAdapter> LoadPeftAdapter(const std::filesystem::path& folder) {
  std::string config_file = (folder / "adapter_config.json").string();
  RF_ASSIGN_OR_RETURN(std::string text, ReadFile(config_file, kMaxConfigBytes));
  json config = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) return DataLoss(config_file, " is not a JSON object");
  RF_RETURN_IF_ERROR(CheckIsPlainLora(config, config_file));
  PeftAdapter adapter;
  json rank = config.value("r", json()), alpha = config.value("lora_alpha", json());
  if (!rank.is_number_integer() || rank.get<int64_t>() < 1 || rank.get<int64_t>() > (1 << 20))
    return InvalidArgument(config_file, ": r is not a positive whole number");
  if (!alpha.is_number() || !std::isfinite(alpha.get<double>()))
    return InvalidArgument(config_file, ": lora_alpha is not a number");
  adapter.rank = rank.get<int64_t>();
  adapter.lora_alpha = alpha.get<double>();
  // rsLoRA scales by lora_alpha / sqrt(r): expressed here as the lora_alpha that gives the same scale by / r.
  if (Flag(config, "use_rslora")) adapter.lora_alpha *= std::sqrt(static_cast<double>(adapter.rank));
  if (json base = config.value("base_model_name_or_path", json()); base.is_string())
    adapter.base_model = base.get<std::string>();

  std::string weights_file = (folder / "adapter_model.safetensors").string();
  RF_ASSIGN_OR_RETURN(std::shared_ptr<SafetensorsFile> weights, SafetensorsFile::Open(weights_file));
  for (const auto& [name, info] : weights->tensors()) {
    std::string module;
    bool is_a = TakeSuffix(name, kSuffixA, &module);
    if (name.rfind(kPrefix, 0) != 0 || (!is_a && !TakeSuffix(name, kSuffixB, &module)))
      return InvalidArgument(weights_file, ": the tensor ", name, " is not a LoRA factor of a linear layer");
    RF_ASSIGN_OR_RETURN(at::Tensor tensor, weights->Get(name));
    LoraPair& pair = adapter.pairs[module.substr(sizeof(kPrefix) - 1)];
    (is_a ? pair.a : pair.b) = tensor.to(at::kFloat);
  }
  if (adapter.pairs.empty()) return DataLoss(weights_file, " holds no LoRA factors");
  for (const auto& [module, pair] : adapter.pairs)
    RF_RETURN_IF_ERROR(CheckPair(weights_file, module, pair, adapter.rank));
  return adapter;
}

Status SavePeftAdapter(const PeftAdapter& adapter, const std::filesystem::path& folder) {
  std::map<std::string, at::Tensor> tensors;
  for (const auto& [module, pair] : adapter.pairs) {
    tensors[Join(kPrefix, module, kSuffixA)] = pair.a.detach().to(at::kCPU, at::kFloat);
    tensors[Join(kPrefix, module, kSuffixB)] = pair.b.detach().to(at::kCPU, at::kFloat);
  }
  RF_RETURN_IF_ERROR(WriteSafetensors(folder / "adapter_model.safetensors", tensors));
  return WriteFileAtomically(folder / "adapter_config.json", PeftAdapterConfig(adapter).dump(2) + "\n");
}

at::Tensor MergeLora(const at::Tensor& weight, const LoraPair& pair, double scale) {
  TORCH_CHECK(weight.dim() == 2 && pair.a.dim() == 2 && pair.b.dim() == 2 && pair.b.size(0) == weight.size(0) &&
                  pair.a.size(1) == weight.size(1) && pair.a.size(0) == pair.b.size(1),
              "LoRA factors ", pair.b.sizes(), " x ", pair.a.sizes(), " do not fit the weight ", weight.sizes());
  at::NoGradGuard no_grad;
  at::Tensor a = pair.a.to(weight.device(), at::kFloat), b = pair.b.to(weight.device(), at::kFloat);
  return at::addmm(weight.to(at::kFloat), b, a, /*beta=*/1, /*alpha=*/scale).to(weight.scalar_type());
}

}  // namespace refinery::checkpoint
