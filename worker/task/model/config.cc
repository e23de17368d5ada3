#include "worker/task/model/config.h"

#include <algorithm>
#include <cmath>
#include <string_view>

#include "worker/task/families/family.h"

namespace refinery::model {
namespace {

using families::Bias;
using families::Family;
using families::Window;
using nlohmann::json;

constexpr int64_t kMaxSize = int64_t{1} << 30;
constexpr int64_t kMaxLayers = 1 << 12;

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
  if (value <= 0 || value > kMaxSize) return InvalidArgument("config.json: '", name, "' is missing, not positive or too large");
  return value;
}

// A number that must be there.
StatusOr<double> RequiredNumber(const json& object, const char* name) {
  auto it = object.find(name);
  if (it == object.end() || !it->is_number()) return InvalidArgument("config.json: '", name, "' is missing in ", object.dump());
  return it->get<double>();
}

StatusOr<const Family*> FamilyOf(const json& config) {
  auto it = config.find("architectures");
  if (it == config.end() || !it->is_array() || it->size() != 1 || !(*it)[0].is_string()) {
    return InvalidArgument("config.json: 'architectures' must name exactly one class");
  }
  const std::string name = (*it)[0].get<std::string>();
  const Family* family = families::FindArchitecture(name);
  if (family == nullptr) {
    return InvalidArgument("config.json: architecture '", name, "' is not supported; known: ", families::KnownArchitectures());
  }
  return family;
}

Status ReadYarn(const json& rope, RopeScaling& scaling) {
  RF_ASSIGN_OR_RETURN(const double fast, Field<double>(rope, "beta_fast", 0.0));
  RF_ASSIGN_OR_RETURN(const double slow, Field<double>(rope, "beta_slow", 0.0));
  if (fast != 0) scaling.beta_fast = fast;  // 0 is read as absent
  if (slow != 0) scaling.beta_slow = slow;
  RF_ASSIGN_OR_RETURN(scaling.mscale, Field<double>(rope, "mscale", 0.0));
  RF_ASSIGN_OR_RETURN(scaling.mscale_all_dim, Field<double>(rope, "mscale_all_dim", 0.0));
  RF_ASSIGN_OR_RETURN(scaling.truncate, Field<bool>(rope, "truncate", true));
  RF_ASSIGN_OR_RETURN(const double attention, Field<double>(rope, "attention_factor", -1.0));
  if (auto it = rope.find("attention_factor"); it != rope.end() && !it->is_null()) scaling.attention_factor = attention;
  if (!(scaling.beta_fast > 0) || !(scaling.beta_slow > 0) || (scaling.attention_factor && !(attention >= 0))) {
    return InvalidArgument("config.json: beta_fast, beta_slow or attention_factor is negative: ", rope.dump());
  }
  return absl::OkStatus();
}

// The fields of one type of scaling; the type itself and the base are read.
Status ReadScaling(const json& config, const json& rope, const ModelConfig& model, RopeScaling& scaling) {
  if (scaling.type == "default") return absl::OkStatus();
  RF_ASSIGN_OR_RETURN(scaling.original_max_position,
                      Field<int64_t>(rope, "original_max_position_embeddings", model.max_position));
  // Beside the object it counts more than within.
  RF_ASSIGN_OR_RETURN(scaling.original_max_position,
                      Field<int64_t>(config, "original_max_position_embeddings", scaling.original_max_position));
  if (scaling.original_max_position <= 0) {
    return InvalidArgument("config.json: 'original_max_position_embeddings' is not positive");
  }
  if (scaling.type == "yarn" && rope.contains("factor") && rope["factor"].is_null()) {
    scaling.factor = static_cast<double>(model.max_position) / static_cast<double>(scaling.original_max_position);
  } else {
    RF_ASSIGN_OR_RETURN(scaling.factor, RequiredNumber(rope, "factor"));
  }
  if (scaling.type == "yarn") RF_RETURN_IF_ERROR(ReadYarn(rope, scaling));
  if (scaling.type == "llama3") {
    RF_ASSIGN_OR_RETURN(scaling.low_freq_factor, RequiredNumber(rope, "low_freq_factor"));
    RF_ASSIGN_OR_RETURN(scaling.high_freq_factor, RequiredNumber(rope, "high_freq_factor"));
  }
  if (!(scaling.factor > 0) || !std::isfinite(scaling.factor) ||
      (scaling.type == "llama3" && !(scaling.low_freq_factor > 0 && scaling.high_freq_factor > scaling.low_freq_factor)) ||
      (scaling.type == "dynamic" && (model.head_dim <= 2 || scaling.factor < 1))) {
    return InvalidArgument("config.json: contradictory rotary scaling: ", rope.dump());
  }
  return absl::OkStatus();
}

// transformers 4 writes rope_theta and rope_scaling {"rope_type" or "type", ...}; transformers 5 writes rope_parameters.
// Where both stand, rope_scaling counts; rope_theta within the object counts more than beside it.
Status ReadRope(const json& config, ModelConfig& out) {
  RF_ASSIGN_OR_RETURN(out.rope_theta, Field<double>(config, "rope_theta", 10000.0));
  RF_ASSIGN_OR_RETURN(double partial, Field<double>(config, "partial_rotary_factor", 1.0));
  json rope = json::object();
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    auto it = config.find(key);
    if (it == config.end() || it->is_null()) continue;
    if (!it->is_object()) return InvalidArgument("config.json: '", key, "' must be an object");
    if (!it->empty()) rope = *it;
  }
  for (const auto& [key, value] : rope.items()) {
    if (value.is_object()) return InvalidArgument("config.json: rotary parameters per layer type ('", key, "') are not supported");
  }
  RF_ASSIGN_OR_RETURN(const std::string old_type, Field<std::string>(rope, "type", "default"));
  RF_ASSIGN_OR_RETURN(out.rope_scaling.type, Field<std::string>(rope, "rope_type", old_type));
  constexpr std::string_view kTypes[] = {"default", "linear", "dynamic", "llama3", "yarn"};
  if (std::ranges::find(kTypes, out.rope_scaling.type) == std::end(kTypes)) {
    return InvalidArgument("config.json: rope type '", out.rope_scaling.type,
                           "' is not supported; known: default, linear, dynamic, llama3, yarn");
  }
  RF_ASSIGN_OR_RETURN(out.rope_theta, Field<double>(rope, "rope_theta", out.rope_theta));
  if (!(out.rope_theta > 1) || !std::isfinite(out.rope_theta)) {
    return InvalidArgument("config.json: 'rope_theta' is ", out.rope_theta, ", not above 1");
  }
  RF_ASSIGN_OR_RETURN(partial, Field<double>(rope, "partial_rotary_factor", partial));
  if (partial != 1.0) return InvalidArgument("config.json: partial_rotary_factor ", partial, " is not supported");
  return ReadScaling(config, rope, out, out.rope_scaling);
}

// Which layers slide, by name or from max_window_layers on.
StatusOr<std::vector<bool>> SlidingLayers(const json& config, int64_t num_layers) {
  std::vector<bool> slides(static_cast<size_t>(num_layers));
  auto types = config.find("layer_types");
  if (types == config.end() || types->is_null()) {
    RF_ASSIGN_OR_RETURN(const int64_t first, Field<int64_t>(config, "max_window_layers", 28));
    for (int64_t i = std::max<int64_t>(0, first); i < num_layers; ++i) slides[static_cast<size_t>(i)] = true;
    return slides;
  }
  if (!types->is_array() || types->size() != slides.size()) {
    return InvalidArgument("config.json: 'layer_types' must be a list of num_hidden_layers (", num_layers, ") names");
  }
  for (size_t i = 0; i < slides.size(); ++i) {
    slides[i] = (*types)[i] == "sliding_attention";
    if (!slides[i] && (*types)[i] != "full_attention") {
      return InvalidArgument("config.json: layer type ", (*types)[i].dump(),
                             " is not supported; known: full_attention, sliding_attention");
    }
  }
  return slides;
}

Status ReadSlidingWindow(const json& config, const Family& family, ModelConfig& out) {
  if (family.window == Window::kNone) return absl::OkStatus();
  int64_t window = family.default_window;
  if (auto it = config.find("sliding_window"); it != config.end()) {
    RF_ASSIGN_OR_RETURN(window, Field<int64_t>(config, "sliding_window", 0));
    if (!it->is_null() && (window <= 0 || window > kMaxSize)) {
      return InvalidArgument("config.json: 'sliding_window' is ", window, "; null switches it off");
    }
  }
  if (family.window == Window::kEveryLayer) {
    out.sliding_window = window;
    return absl::OkStatus();
  }
  RF_ASSIGN_OR_RETURN(const bool use, Field<bool>(config, "use_sliding_window", false));
  if (!use) window = 0;
  const bool named = config.contains("layer_types") && !config["layer_types"].is_null();
  if (window == 0 && !named) return absl::OkStatus();
  RF_ASSIGN_OR_RETURN(const std::vector<bool> slides, SlidingLayers(config, out.num_layers));
  const int64_t sliding = std::ranges::count(slides, true);
  if (sliding > 0 && window == 0) {
    return InvalidArgument("config.json: 'layer_types' names sliding_attention, but there is no sliding window; set "
                           "sliding_window and use_sliding_window");
  }
  if (sliding == out.num_layers) {
    out.sliding_window = window;
  } else if (sliding > 0) {
    for (const bool slide : slides) out.layer_windows.push_back(slide ? window : 0);
  }
  return absl::OkStatus();
}

StatusOr<bool> HasBias(const json& config, Bias bias, const char* field) {
  if (bias == Bias::kConfigured) return Field<bool>(config, field, false);
  return bias == Bias::kAlways;
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

Status ReadSizes(const json& config, const Family& family, ModelConfig& out) {
  RF_ASSIGN_OR_RETURN(out.hidden_size, Required(config, "hidden_size"));
  RF_ASSIGN_OR_RETURN(out.intermediate_size, Required(config, "intermediate_size"));
  RF_ASSIGN_OR_RETURN(out.num_layers, Required(config, "num_hidden_layers"));
  RF_ASSIGN_OR_RETURN(out.num_heads, Required(config, "num_attention_heads"));
  RF_ASSIGN_OR_RETURN(out.vocab_size, Required(config, "vocab_size"));
  RF_ASSIGN_OR_RETURN(out.max_position, Required(config, "max_position_embeddings"));
  if (out.num_layers > kMaxLayers) return InvalidArgument("config.json: 'num_hidden_layers' is ", out.num_layers);
  const bool silent = !config.contains("num_key_value_heads") && family.default_kv_heads > 0;
  RF_ASSIGN_OR_RETURN(out.num_kv_heads,
                      Field<int64_t>(config, "num_key_value_heads", silent ? family.default_kv_heads : out.num_heads));
  const int64_t divided = out.hidden_size / out.num_heads;
  RF_ASSIGN_OR_RETURN(out.head_dim,
                      Field<int64_t>(config, "head_dim", family.default_head_dim > 0 ? family.default_head_dim : divided));
  if (out.num_kv_heads <= 0 || out.num_heads % out.num_kv_heads != 0) {
    return InvalidArgument("config.json: num_attention_heads ", out.num_heads, " is not a multiple of num_key_value_heads ",
                           out.num_kv_heads);
  }
  if (out.head_dim <= 0 || out.head_dim > kMaxSize || out.head_dim % 2 != 0) {
    return InvalidArgument("config.json: head_dim ", out.head_dim, " must be even and positive");
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<ModelConfig> ModelConfig::FromJson(const nlohmann::json& config) {
  if (!config.is_object()) return InvalidArgument("config.json: not a JSON object");
  ModelConfig out;
  RF_ASSIGN_OR_RETURN(const Family* family, FamilyOf(config));
  out.architecture = family->architecture;
  RF_RETURN_IF_ERROR(ReadSizes(config, *family, out));
  RF_ASSIGN_OR_RETURN(const std::string activation, Field<std::string>(config, "hidden_act", "silu"));
  if (activation != "silu") return InvalidArgument("config.json: hidden_act '", activation, "' is not supported; only silu");
  RF_ASSIGN_OR_RETURN(out.rms_norm_eps, Field<double>(config, "rms_norm_eps", 1e-6));
  RF_ASSIGN_OR_RETURN(out.tie_word_embeddings, Field<bool>(config, "tie_word_embeddings", false));
  RF_RETURN_IF_ERROR(ReadRope(config, out));
  RF_RETURN_IF_ERROR(ReadSlidingWindow(config, *family, out));
  RF_RETURN_IF_ERROR(ReadEndIds(config, out));
  RF_ASSIGN_OR_RETURN(out.attention_bias, HasBias(config, family->qkv_bias, "attention_bias"));
  RF_ASSIGN_OR_RETURN(out.attention_output_bias, HasBias(config, family->output_bias, "attention_bias"));
  RF_ASSIGN_OR_RETURN(out.mlp_bias, HasBias(config, family->mlp_bias, "mlp_bias"));
  out.qk_norm = family->qk_norm;
  return out;
}

}  // namespace refinery::model
