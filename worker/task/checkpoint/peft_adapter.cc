#include "worker/task/runtime/torch.h"
//
#include "worker/task/checkpoint/peft_adapter.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>
#include <vector>

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
  for (const char* key : {"modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices"})
    if (IsSet(config, key)) return InvalidArgument(file, ": ", key, " is not supported; train a plain LoRA adapter");
  if (Flag(config, "use_rslora") && (IsSet(config, "rank_pattern") || IsSet(config, "alpha_pattern")))
    return InvalidArgument(file, ": use_rslora together with rank_pattern or alpha_pattern is not supported");
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

// rank_pattern or alpha_pattern: numbers by the end of a module's name. PEFT reads the keys as regular expressions; those that
// are names mean the same as text.
class Pattern {
 public:
  static StatusOr<Pattern> Read(const nlohmann::ordered_json& config, const char* key, const std::string& file) {
    Pattern pattern;
    const nlohmann::ordered_json map = config.value(key, nlohmann::ordered_json());
    if (map.is_null()) return pattern;
    if (!map.is_object()) return InvalidArgument(file, ": ", key, " is not an object");
    for (const auto& [name, value] : map.items()) {
      const std::string_view text = std::string_view(name).substr(name.starts_with('^') ? 1 : 0);
      const bool plain = !text.empty() && std::ranges::all_of(text, [](unsigned char c) {
        return std::isalnum(c) || c == '_' || c == '-' || c == '.';
      });
      if (!plain) return InvalidArgument(file, ": ", key, ": \"", name, "\" is not the end of a module's name; write the names out");
      if (!value.is_number() || !std::isfinite(value.get<double>()))
        return InvalidArgument(file, ": ", key, ": the value of \"", name, "\" is not a number");
      pattern.entries_.push_back({std::string(text), name.starts_with('^'), value.get<double>()});
    }
    return pattern;
  }

  bool empty() const { return entries_.empty(); }
  // The first entry in the file's order that fits, as in PEFT.
  double Of(std::string_view module, double fallback) const {
    for (const Entry& entry : entries_) {
      if (!module.ends_with(entry.text)) continue;
      const size_t before = module.size() - entry.text.size();
      if (before == 0 || (!entry.whole && module[before - 1] == '.')) return entry.value;
    }
    return fallback;
  }

 private:
  struct Entry {
    std::string text;
    bool whole;  // began with ^
    double value;
  };
  std::vector<Entry> entries_;
};

// Multiplies each module's own scale into its B, so that the common scale is 1.
Status ApplyPatterns(const Pattern& ranks, const Pattern& alphas, const std::string& file, PeftAdapter& adapter) {
  for (auto& [module, pair] : adapter.pairs) {
    const double rank = ranks.Of(module, static_cast<double>(adapter.rank)), alpha = alphas.Of(module, adapter.lora_alpha);
    if (rank != std::floor(rank) || rank < 1 || rank > (1 << 20))
      return InvalidArgument(file, ": the rank ", rank, " of ", module, " is not a positive whole number");
    RF_RETURN_IF_ERROR(CheckPair(file, module, pair, static_cast<int64_t>(rank)));
    pair.b = pair.b * (alpha / rank);
  }
  adapter.lora_alpha = static_cast<double>(adapter.rank);
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
  json ranks = json::object(), alphas = json::object();  // of modules with a rank of their own: the same scale
  for (const auto& [module, pair] : adapter.pairs) {
    const int64_t rank = pair.a.size(0);
    if (rank == adapter.rank) continue;
    ranks[module] = rank;
    alphas[module] = adapter.scale() * static_cast<double>(rank);
  }
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
          {"rank_pattern", ranks},
          {"alpha_pattern", alphas},
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
  const auto ordered = nlohmann::ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
  RF_ASSIGN_OR_RETURN(Pattern ranks, Pattern::Read(ordered, "rank_pattern", config_file));
  RF_ASSIGN_OR_RETURN(Pattern alphas, Pattern::Read(ordered, "alpha_pattern", config_file));
  if (!ranks.empty() || !alphas.empty()) {
    RF_RETURN_IF_ERROR(ApplyPatterns(ranks, alphas, weights_file, adapter));
    return adapter;
  }
  for (const auto& [module, pair] : adapter.pairs)
    RF_RETURN_IF_ERROR(CheckPair(weights_file, module, pair, adapter.rank));
  return adapter;
}

StatusOr<PeftAdapter> StackAdapters(const std::vector<PeftAdapter>& adapters) {
  if (adapters.empty()) return InvalidArgument("there is no adapter to stack");
  if (adapters.size() == 1) return adapters[0];
  PeftAdapter stack{.rank = adapters[0].rank, .lora_alpha = static_cast<double>(adapters[0].rank), .base_model = adapters[0].base_model};
  for (const PeftAdapter& adapter : adapters) {
    for (const auto& [module, pair] : adapter.pairs) {
      LoraPair scaled{pair.a, pair.b * adapter.scale()};
      auto [entry, inserted] = stack.pairs.emplace(module, scaled);
      if (inserted) continue;
      LoraPair& sum = entry->second;
      if (sum.a.size(1) != pair.a.size(1) || sum.b.size(0) != pair.b.size(0))
        return InvalidArgument("the adapters have factors of different sizes for ", module, "; they belong to different models");
      sum = {at::cat({sum.a, scaled.a}, 0), at::cat({sum.b, scaled.b}, 1)};
    }
  }
  return stack;
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
