#include "worker/task/model/config.h"

#include <algorithm>
#include <string_view>

namespace refinery::model {
namespace {

using nlohmann::json;

constexpr std::string_view kKnownArchitectures[] = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM",
                                                    "Qwen3ForCausalLM"};
constexpr int64_t kMistralDefaultWindow = 4096;  // transformers' default when config.json does not name it

// A field that is absent or null keeps `fallback`; one of another type is an error that names it.
template <typename T>
StatusOr<T> Field(const json& object, const char* name, T fallback) {
  auto it = object.find(name);
  if (it == object.end() || it->is_null()) return fallback;
  const bool fits = std::is_same_v<T, bool>          ? it->is_boolean()
                    : std::is_same_v<T, int64_t>     ? it->is_number_integer()
                    : std::is_same_v<T, std::string> ? it->is_string()
                                                     : it->is_number();
  if (!fits) return InvalidArgument("config.json: '", name, "' has the wrong type: ", it->dump());
  return it->get<T>();
}

StatusOr<int64_t> Required(const json& object, const char* name) {
  RF_ASSIGN_OR_RETURN(const int64_t value, Field<int64_t>(object, name, 0));
  if (value <= 0) return InvalidArgument("config.json: '", name, "' is missing or not positive");
  return value;
}

StatusOr<std::string> Architecture(const json& config) {
  auto it = config.find("architectures");
  if (it == config.end() || !it->is_array() || it->size() != 1 || !(*it)[0].is_string()) {
    return InvalidArgument("config.json: 'architectures' must name exactly one class");
  }
  const std::string name = (*it)[0].get<std::string>();
  if (std::ranges::find(kKnownArchitectures, name) == std::end(kKnownArchitectures)) {
    std::string known;
    for (std::string_view k : kKnownArchitectures) known += Join(known.empty() ? "" : ", ", k);
    return InvalidArgument("config.json: architecture '", name, "' is not supported; known: ", known);
  }
  return name;
}

// transformers 4 writes rope_theta and rope_scaling {"rope_type" or "type", ...}; transformers 5 writes rope_parameters.
Status ReadRope(const json& config, ModelConfig& out) {
  RF_ASSIGN_OR_RETURN(out.rope_theta, Field<double>(config, "rope_theta", 10000.0));
  const char* key = config.contains("rope_parameters") ? "rope_parameters" : "rope_scaling";
  auto it = config.find(key);
  if (it == config.end() || it->is_null()) return absl::OkStatus();
  if (!it->is_object()) return InvalidArgument("config.json: '", key, "' must be an object");
  const json& rope = *it;
  RopeScaling& scaling = out.rope_scaling;
  RF_ASSIGN_OR_RETURN(const std::string old_type, Field<std::string>(rope, "type", "default"));
  RF_ASSIGN_OR_RETURN(scaling.type, Field<std::string>(rope, "rope_type", old_type));
  constexpr std::string_view kTypes[] = {"default", "linear", "dynamic", "llama3", "yarn"};
  if (std::ranges::find(kTypes, scaling.type) == std::end(kTypes)) {
    return InvalidArgument("config.json: rope type '", scaling.type,
                           "' is not supported; known: default, linear, dynamic, llama3, yarn");
  }
  RF_ASSIGN_OR_RETURN(out.rope_theta, Field<double>(rope, "rope_theta", out.rope_theta));
  RF_ASSIGN_OR_RETURN(const double partial, Field<double>(rope, "partial_rotary_factor", 1.0));
  if (partial != 1.0) return InvalidArgument("config.json: partial_rotary_factor ", partial, " is not supported");
  RF_ASSIGN_OR_RETURN(scaling.factor, Field<double>(rope, "factor", 1.0));
  RF_ASSIGN_OR_RETURN(scaling.low_freq_factor, Field<double>(rope, "low_freq_factor", 1.0));
  RF_ASSIGN_OR_RETURN(scaling.high_freq_factor, Field<double>(rope, "high_freq_factor", 4.0));
  RF_ASSIGN_OR_RETURN(scaling.beta_fast, Field<double>(rope, "beta_fast", 32.0));
  RF_ASSIGN_OR_RETURN(scaling.beta_slow, Field<double>(rope, "beta_slow", 1.0));
  RF_ASSIGN_OR_RETURN(scaling.attention_factor, Field<double>(rope, "attention_factor", 0.0));
  RF_ASSIGN_OR_RETURN(scaling.original_max_position,
                      Field<int64_t>(rope, "original_max_position_embeddings", out.max_position));
  for (const char* unsupported : {"mscale", "mscale_all_dim"}) {
    if (rope.contains(unsupported)) return InvalidArgument("config.json: rope '", unsupported, "' is not supported");
  }
  if (!(scaling.factor >= 1.0) || scaling.original_max_position <= 0 ||
      (scaling.type == "llama3" && !(scaling.high_freq_factor > scaling.low_freq_factor))) {
    return InvalidArgument("config.json: contradictory fields in '", key, "': ", rope.dump());
  }
  return absl::OkStatus();
}

// Which layers slide must be the same for all: every layer or none.
Status ReadSlidingWindow(const json& config, ModelConfig& out) {
  const bool mistral = out.architecture == "MistralForCausalLM";
  if (mistral && !config.contains("sliding_window")) {
    out.sliding_window = kMistralDefaultWindow;
    return absl::OkStatus();
  }
  RF_ASSIGN_OR_RETURN(const int64_t window, Field<int64_t>(config, "sliding_window", 0));
  RF_ASSIGN_OR_RETURN(const bool use, Field<bool>(config, "use_sliding_window", mistral));
  if (window <= 0 || !use || out.architecture == "LlamaForCausalLM") return absl::OkStatus();
  if (mistral) {
    out.sliding_window = window;
    return absl::OkStatus();
  }
  int64_t sliding = 0;  // layers
  if (auto it = config.find("layer_types"); it != config.end() && it->is_array()) {
    sliding = std::ranges::count(*it, json("sliding_attention"));
  } else {
    RF_ASSIGN_OR_RETURN(const int64_t first, Field<int64_t>(config, "max_window_layers", 28));
    sliding = std::max<int64_t>(0, out.num_layers - first);
  }
  if (sliding != 0 && sliding != out.num_layers) {
    return InvalidArgument("config.json: sliding_window on ", sliding, " of ", out.num_layers,
                           " layers is not supported; it must be all or none");
  }
  out.sliding_window = sliding == 0 ? 0 : window;
  return absl::OkStatus();
}

Status ReadEndIds(const json& config, ModelConfig& out) {
  auto it = config.find("eos_token_id");
  if (it == config.end() || it->is_null()) return absl::OkStatus();
  const json list = it->is_array() ? *it : json::array({*it});
  for (const json& id : list) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= out.vocab_size) {
      return InvalidArgument("config.json: 'eos_token_id' must hold ids below vocab_size, not ", id.dump());
    }
    out.eos_token_ids.push_back(id.get<int32_t>());
  }
  return absl::OkStatus();
}

Status ReadSizes(const json& config, ModelConfig& out) {
  RF_ASSIGN_OR_RETURN(out.hidden_size, Required(config, "hidden_size"));
  RF_ASSIGN_OR_RETURN(out.intermediate_size, Required(config, "intermediate_size"));
  RF_ASSIGN_OR_RETURN(out.num_layers, Required(config, "num_hidden_layers"));
  RF_ASSIGN_OR_RETURN(out.num_heads, Required(config, "num_attention_heads"));
  RF_ASSIGN_OR_RETURN(out.vocab_size, Required(config, "vocab_size"));
  RF_ASSIGN_OR_RETURN(out.max_position, Required(config, "max_position_embeddings"));
  if (out.architecture == "LlamaForCausalLM" || config.contains("num_key_value_heads")) {
    RF_ASSIGN_OR_RETURN(out.num_kv_heads, Field<int64_t>(config, "num_key_value_heads", out.num_heads));
  } else {
    return InvalidArgument("config.json: 'num_key_value_heads' is missing");
  }
  // Qwen3 fixes 128 where the file is silent; the others divide.
  const bool qwen3 = out.architecture == "Qwen3ForCausalLM";
  RF_ASSIGN_OR_RETURN(out.head_dim, Field<int64_t>(config, "head_dim", qwen3 ? 128 : out.hidden_size / out.num_heads));
  if (out.num_kv_heads <= 0 || out.num_heads % out.num_kv_heads != 0) {
    return InvalidArgument("config.json: num_attention_heads ", out.num_heads, " is not a multiple of num_key_value_heads ",
                           out.num_kv_heads);
  }
  if (out.head_dim <= 0 || out.head_dim % 2 != 0) {
    return InvalidArgument("config.json: head_dim ", out.head_dim, " must be even and positive");
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<ModelConfig> ModelConfig::FromJson(const nlohmann::json& config) {
  if (!config.is_object()) return InvalidArgument("config.json: not a JSON object");
  ModelConfig out;
  RF_ASSIGN_OR_RETURN(out.architecture, Architecture(config));
  RF_RETURN_IF_ERROR(ReadSizes(config, out));
  RF_ASSIGN_OR_RETURN(const std::string activation, Field<std::string>(config, "hidden_act", "silu"));
  if (activation != "silu") return InvalidArgument("config.json: hidden_act '", activation, "' is not supported; only silu");
  RF_ASSIGN_OR_RETURN(out.rms_norm_eps, Field<double>(config, "rms_norm_eps", 1e-6));
  RF_ASSIGN_OR_RETURN(out.tie_word_embeddings, Field<bool>(config, "tie_word_embeddings", false));
  RF_RETURN_IF_ERROR(ReadRope(config, out));
  RF_RETURN_IF_ERROR(ReadSlidingWindow(config, out));
  RF_RETURN_IF_ERROR(ReadEndIds(config, out));
  if (out.architecture == "Qwen2ForCausalLM") {
    out.attention_bias = true;
  } else if (out.architecture != "MistralForCausalLM") {
    RF_ASSIGN_OR_RETURN(out.attention_bias, Field<bool>(config, "attention_bias", false));
    out.attention_output_bias = out.attention_bias;
  }
  if (out.architecture == "LlamaForCausalLM") {
    RF_ASSIGN_OR_RETURN(out.mlp_bias, Field<bool>(config, "mlp_bias", false));
  }
  out.qk_norm = out.architecture == "Qwen3ForCausalLM";
  return out;
}

}  // namespace refinery::model
