#include "worker/task/runtime/torch.h"
//
#include "worker/task/checkpoint/gguf_model.h"

#include <charconv>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/files.h"
#include "worker/task/checkpoint/gguf_tokenizer.h"
#include "worker/task/checkpoint/safetensors_writer.h"
#include "worker/task/families/family.h"

namespace refinery::checkpoint {
namespace {

using families::Bias;
using families::Family;
using families::Window;
using nlohmann::json;
using nlohmann::ordered_json;

constexpr int64_t kMaxSize = int64_t{1} << 31;
constexpr int64_t kPartElements = int64_t{4} << 20;  // weights converted at a time

// GGUF stores floats in 32 bits: 1e-5 reads as 9.99999974e-06. The shortest decimal that rounds to the same float is
// what the model's author wrote.
double ShortestDecimal(double value) {
  char text[64];
  auto written = std::to_chars(text, text + sizeof(text), static_cast<float>(value));
  double result = value;
  std::from_chars(text, written.ptr, result);
  return result;
}

// Reads and checks the metadata of one model.
class Describer {
 public:
  explicit Describer(const GgufFile& file) : file_(file), name_(file.path().string()) {}

  StatusOr<GgufModel> Describe() {
    RF_RETURN_IF_ERROR(ReadArchitecture());
    RF_RETURN_IF_ERROR(ReadSizes());
    RF_RETURN_IF_ERROR(MapWeights());
    RF_RETURN_IF_ERROR(DecideTying());
    RF_RETURN_IF_ERROR(WriteConfig());
    RF_RETURN_IF_ERROR(ReadRopeScaling());
    RF_RETURN_IF_ERROR(WriteTokenIds());
    return std::move(model_);
  }

 private:
  std::string Key(const char* field) const { return Join(family_->gguf, ".", field); }

  StatusOr<int64_t> Size(const char* field, std::optional<int64_t> fallback = std::nullopt) const {
    std::optional<int64_t> value = file_.Int(Key(field));
    if (!value) value = fallback;
    if (!value) return DataLoss(name_, ": metadata ", Key(field), " is missing");
    if (*value < 1 || *value > kMaxSize) return DataLoss(name_, ": metadata ", Key(field), " is ", *value);
    return *value;
  }

  Status ReadArchitecture() {
    if (file_.Int("split.count").value_or(1) > 1)
      return InvalidArgument(name_, " is one part of a split model; merge the parts with llama-gguf-split first");
    std::string_view wanted = file_.String("general.architecture").value_or("");
    family_ = families::FindGguf(wanted);
    if (family_ == nullptr)
      return InvalidArgument(name_, ": the architecture \"", wanted, "\" is not supported (known: ",
                             families::KnownGgufArchitectures(), ")");
    return absl::OkStatus();
  }

  Status ReadSizes() {
    RF_ASSIGN_OR_RETURN(layers_, Size("block_count"));
    RF_ASSIGN_OR_RETURN(hidden_, Size("embedding_length"));
    RF_ASSIGN_OR_RETURN(feed_forward_, Size("feed_forward_length"));
    RF_ASSIGN_OR_RETURN(heads_, Size("attention.head_count"));
    RF_ASSIGN_OR_RETURN(kv_heads_, Size("attention.head_count_kv", heads_));
    RF_ASSIGN_OR_RETURN(head_dim_, Size("attention.key_length", std::max<int64_t>(1, hidden_ / heads_)));
    RF_ASSIGN_OR_RETURN(int64_t value_dim, Size("attention.value_length", head_dim_));
    RF_ASSIGN_OR_RETURN(int64_t rotary, Size("rope.dimension_count", head_dim_));
    if (heads_ % kv_heads_ != 0 || head_dim_ % 2 != 0)
      return DataLoss(name_, ": ", heads_, " heads, ", kv_heads_, " key-value heads, head size ", head_dim_,
                      " do not fit together");
    if (value_dim != head_dim_ || rotary != head_dim_)
      return InvalidArgument(name_, ": heads whose value or rotary size differs from the key size are not supported");
    if (file_.Int(Key("expert_count")).value_or(0) > 0)
      return InvalidArgument(name_, " is a mixture of experts, which is not supported");
    const GgufTensor* embedding = file_.Find("token_embd.weight");
    if (embedding == nullptr) return DataLoss(name_, ": the tensor token_embd.weight is missing");
    vocab_size_ = embedding->rows();
    return absl::OkStatus();
  }

  // Registers the tensor `from`, which must have the given shape, under the Hugging Face name `to`.
  Status Map(const std::string& from, const std::string& to, const std::vector<int64_t>& shape, int64_t heads = 0) {
    const GgufTensor* tensor = file_.Find(from);
    if (tensor == nullptr) return DataLoss(name_, ": the tensor ", from, " is missing");
    if (tensor->shape != shape)
      return DataLoss(name_, ": the tensor ", from, " has the shape [", ShapeText(tensor->shape), "], not [",
                      ShapeText(shape), "]");
    ++mapped_;
    model_.weights[to] = {tensor, family_->gguf_interleaved ? heads : 0};
    return absl::OkStatus();
  }

  static std::string ShapeText(const std::vector<int64_t>& shape) {
    std::string text;
    for (int64_t size : shape) text += Join(text.empty() ? "" : ", ", size);
    return text;
  }

  Status MapLayer(int64_t layer) {
    std::string from = Join("blk.", layer, "."), to = Join("model.layers.", layer, ".");
    int64_t q = heads_ * head_dim_, kv = kv_heads_ * head_dim_;
    RF_RETURN_IF_ERROR(Map(from + "attn_norm.weight", to + "input_layernorm.weight", {hidden_}));
    RF_RETURN_IF_ERROR(Map(from + "ffn_norm.weight", to + "post_attention_layernorm.weight", {hidden_}));
    RF_RETURN_IF_ERROR(Map(from + "attn_q.weight", to + "self_attn.q_proj.weight", {q, hidden_}, heads_));
    RF_RETURN_IF_ERROR(Map(from + "attn_k.weight", to + "self_attn.k_proj.weight", {kv, hidden_}, kv_heads_));
    RF_RETURN_IF_ERROR(Map(from + "attn_v.weight", to + "self_attn.v_proj.weight", {kv, hidden_}));
    RF_RETURN_IF_ERROR(Map(from + "attn_output.weight", to + "self_attn.o_proj.weight", {hidden_, q}));
    RF_RETURN_IF_ERROR(Map(from + "ffn_gate.weight", to + "mlp.gate_proj.weight", {feed_forward_, hidden_}));
    RF_RETURN_IF_ERROR(Map(from + "ffn_up.weight", to + "mlp.up_proj.weight", {feed_forward_, hidden_}));
    RF_RETURN_IF_ERROR(Map(from + "ffn_down.weight", to + "mlp.down_proj.weight", {hidden_, feed_forward_}));
    if (file_.Find("blk.0.attn_q.bias") != nullptr) {
      RF_RETURN_IF_ERROR(Map(from + "attn_q.bias", to + "self_attn.q_proj.bias", {q}, heads_));
      RF_RETURN_IF_ERROR(Map(from + "attn_k.bias", to + "self_attn.k_proj.bias", {kv}, kv_heads_));
      RF_RETURN_IF_ERROR(Map(from + "attn_v.bias", to + "self_attn.v_proj.bias", {kv}));
    }
    if (file_.Find("blk.0.attn_output.bias") != nullptr)
      RF_RETURN_IF_ERROR(Map(from + "attn_output.bias", to + "self_attn.o_proj.bias", {hidden_}));
    if (file_.Find("blk.0.attn_q_norm.weight") != nullptr) {
      RF_RETURN_IF_ERROR(Map(from + "attn_q_norm.weight", to + "self_attn.q_norm.weight", {head_dim_}));
      RF_RETURN_IF_ERROR(Map(from + "attn_k_norm.weight", to + "self_attn.k_norm.weight", {head_dim_}));
    }
    return absl::OkStatus();
  }

  Status MapWeights() {
    RF_RETURN_IF_ERROR(Map("token_embd.weight", "model.embed_tokens.weight", {vocab_size_, hidden_}));
    RF_RETURN_IF_ERROR(Map("output_norm.weight", "model.norm.weight", {hidden_}));
    if (file_.Find("output.weight") != nullptr)
      RF_RETURN_IF_ERROR(Map("output.weight", "lm_head.weight", {vocab_size_, hidden_}));
    for (int64_t layer = 0; layer < layers_; ++layer) RF_RETURN_IF_ERROR(MapLayer(layer));
    size_t extra = file_.Find("rope_freqs.weight") != nullptr ? 1 : 0;
    if (file_.tensors().size() != mapped_ + extra) return UnknownTensor();
    bool qkv_bias = file_.Find("blk.0.attn_q.bias") != nullptr;
    bool o_bias = file_.Find("blk.0.attn_output.bias") != nullptr;
    bool qk_norm = file_.Find("blk.0.attn_q_norm.weight") != nullptr;
    const auto fits = [](Bias bias, bool has) { return bias == Bias::kConfigured || has == (bias == Bias::kAlways); };
    // One field of config.json stands for both kinds of bias where they are configured.
    const bool both = family_->qkv_bias == Bias::kConfigured && family_->output_bias == Bias::kConfigured;
    if (!fits(family_->qkv_bias, qkv_bias) || !fits(family_->output_bias, o_bias) || (both && qkv_bias != o_bias) ||
        qk_norm != family_->qk_norm)
      return InvalidArgument(name_, ": this combination of attention biases and norms is not known for ", family_->gguf);
    attention_bias_ = qkv_bias;
    return absl::OkStatus();
  }

  Status UnknownTensor() const {
    for (const auto& [name, tensor] : file_.tensors()) {
      bool used = name == "rope_freqs.weight";
      for (const auto& [to, source] : model_.weights) used = used || source.tensor == &tensor;
      if (!used) return InvalidArgument(name_, ": the tensor ", name, " has no place in ", std::string(family_->architecture));
    }
    return Internal("tensors of ", name_, " were counted wrongly");
  }

  // Tied when there is one matrix, or when the two are the same up to the error of quantization (then the finer one
  // counts).
  Status DecideTying() {
    auto head = model_.weights.find("lm_head.weight");
    tied_ = head == model_.weights.end();
    if (tied_) return absl::OkStatus();
    const GgufTensor& output = *head->second.tensor;
    const GgufTensor& embedding = *model_.weights.at("model.embed_tokens.weight").tensor;
    constexpr int64_t kSamples = 64;
    std::vector<float> a(static_cast<size_t>(hidden_)), b(a.size());
    double difference = 0, norm = 0;
    for (int64_t sample = 0; sample < kSamples; ++sample) {
      int64_t row = vocab_size_ * sample / kSamples;
      file_.DequantizeRows(embedding, row, 1, a.data());
      file_.DequantizeRows(output, row, 1, b.data());
      for (size_t i = 0; i < a.size(); ++i) {
        difference += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
        norm += double{b[i]} * b[i];
      }
    }
    // Unrelated matrices differ by about twice the norm, two quantizations of one matrix by a few percent.
    if (!(difference < 0.25 * norm)) return absl::OkStatus();
    tied_ = true;
    if (output.end - output.begin > embedding.end - embedding.begin)
      model_.weights["model.embed_tokens.weight"] = head->second;
    model_.weights.erase("lm_head.weight");
    return absl::OkStatus();
  }

  Status WriteConfig() {
    std::optional<double> eps = file_.Float(Key("attention.layer_norm_rms_epsilon"));
    double theta = file_.Float(Key("rope.freq_base")).value_or(10000.0);
    if (!eps || !(*eps > 0) || !(*eps < 1) || !(theta > 0) || !std::isfinite(theta))
      return DataLoss(name_, ": the RMS norm epsilon or the rotary base is missing or out of range");
    RF_ASSIGN_OR_RETURN(int64_t context, Size("context_length"));
    ordered_json& config = model_.config;
    config["architectures"] = {std::string(family_->architecture)};
    config["model_type"] = std::string(family_->model_type);
    config["vocab_size"] = vocab_size_;
    config["hidden_size"] = hidden_;
    config["intermediate_size"] = feed_forward_;
    config["num_hidden_layers"] = layers_;
    config["num_attention_heads"] = heads_;
    config["num_key_value_heads"] = kv_heads_;
    config["head_dim"] = head_dim_;
    config["hidden_act"] = "silu";
    config["max_position_embeddings"] = context;
    config["rms_norm_eps"] = ShortestDecimal(*eps);
    config["rope_theta"] = ShortestDecimal(theta);
    config["tie_word_embeddings"] = tied_;
    config["attention_dropout"] = 0.0;
    config["initializer_range"] = 0.02;
    config["use_cache"] = true;
    config["torch_dtype"] = "bfloat16";
    if (family_->qkv_bias == Bias::kConfigured) config["attention_bias"] = attention_bias_;
    if (family_->mlp_bias == Bias::kConfigured) config["mlp_bias"] = false;
    if (family_->window == Window::kByLayer) config["use_sliding_window"] = false;
    return absl::OkStatus();
  }

  Status ReadRopeScaling() {
    if (file_.Find("rope_freqs.weight") != nullptr) return ReadLlama3Scaling();
    std::string type(file_.String(Key("rope.scaling.type")).value_or("none"));
    if (type == "none") return absl::OkStatus();
    double factor = file_.Float(Key("rope.scaling.factor")).value_or(0);
    if ((type != "linear" && type != "yarn") || !(factor > 0))
      return InvalidArgument(name_, ": rotary scaling \"", type, "\" by ", factor, " is not supported");
    ordered_json scaling = {{"rope_type", type}, {"factor", ShortestDecimal(factor)}};
    if (type == "yarn")
      if (std::optional<int64_t> original = file_.Int(Key("rope.scaling.original_context_length")))
        scaling["original_max_position_embeddings"] = *original;
    model_.config["rope_scaling"] = scaling;
    return absl::OkStatus();
  }

  // Llama 3.1's scaling stands in GGUF as one divisor per frequency. The parameters behind them are always the released
  // ones but for the factor, which is the largest divisor; the formula must give back what the file holds.
  Status ReadLlama3Scaling() {
    RF_ASSIGN_OR_RETURN(at::Tensor divisors, file_.Dequantize("rope_freqs.weight"));
    if (divisors.numel() != head_dim_ / 2) return DataLoss(name_, ": rope_freqs.weight does not fit the head size");
    const float* stored = divisors.data_ptr<float>();
    constexpr double kLow = 1, kHigh = 4, kOriginal = 8192;
    double theta = model_.config["rope_theta"].get<double>(), factor = divisors.max().item<double>();
    for (int64_t i = 0; i < divisors.numel(); ++i) {
      double exponent = 2.0 * static_cast<double>(i) / static_cast<double>(head_dim_);
      double wavelength = 2 * M_PI * std::pow(theta, exponent), expected = 1;
      if (wavelength > kOriginal / kLow) {
        expected = factor;
      } else if (wavelength >= kOriginal / kHigh) {
        double smooth = (kOriginal / wavelength - kLow) / (kHigh - kLow);
        expected = 1 / ((1 - smooth) / factor + smooth);
      }
      if (!(std::abs(stored[i] - expected) <= 1e-3 * expected))
        return InvalidArgument(name_, ": rope_freqs.weight is not the scaling of Llama 3.1; it is not supported");
    }
    model_.config["rope_scaling"] = {{"rope_type", "llama3"}, {"factor", factor}, {"low_freq_factor", kLow},
                                     {"high_freq_factor", kHigh}, {"original_max_position_embeddings", 8192}};
    return absl::OkStatus();
  }

  Status WriteTokenIds() {
    ordered_json& generation = model_.generation_config;
    generation["_from_model_config"] = true;
    for (auto [field, key] : {std::pair{"bos_token_id", "tokenizer.ggml.bos_token_id"},
                              std::pair{"eos_token_id", "tokenizer.ggml.eos_token_id"},
                              std::pair{"pad_token_id", "tokenizer.ggml.padding_token_id"}}) {
      std::optional<int64_t> id = file_.Int(key);
      if (!id) continue;
      if (*id < 0 || *id >= vocab_size_) return DataLoss(name_, ": metadata ", key, " is ", *id);
      model_.config[field] = *id;
      generation[field] = *id;
    }
    // Where a turn ends with another token than the text, generation stops at both.
    std::optional<int64_t> turn = file_.Int("tokenizer.ggml.eot_token_id");
    if (turn && *turn >= 0 && *turn < vocab_size_ && generation.contains("eos_token_id") &&
        generation["eos_token_id"] != *turn)
      generation["eos_token_id"] = {generation["eos_token_id"].get<int64_t>(), *turn};
    if (const std::vector<std::string_view>* tokens = file_.Strings("tokenizer.ggml.tokens"))
      if (static_cast<int64_t>(tokens->size()) > vocab_size_)
        return DataLoss(name_, ": ", tokens->size(), " tokens, but ", vocab_size_, " embeddings");
    return absl::OkStatus();
  }

  const GgufFile& file_;
  std::string name_;
  const Family* family_ = nullptr;
  int64_t layers_ = 0, hidden_ = 0, feed_forward_ = 0, heads_ = 0, kv_heads_ = 0, head_dim_ = 0, vocab_size_ = 0;
  bool attention_bias_ = false, tied_ = false;
  size_t mapped_ = 0;
  GgufModel model_;
};

// The row of the file that becomes row `row`: within a head, ggml's order is (0, half, 1, half + 1, ...).
int64_t SourceRow(int64_t row, int64_t head_rows) {
  int64_t head = row / head_rows, within = row % head_rows, half = head_rows / 2;
  return head * head_rows + (within < half ? 2 * within : 2 * (within - half) + 1);
}

// Rows [first, first + count) of the tensor in Hugging Face's order, as bf16.
void ConvertRows(const GgufFile& file, const GgufSource& source, int64_t first, int64_t count, at::BFloat16* out) {
  const GgufTensor& tensor = *source.tensor;
  const int64_t width = tensor.row_size();
  const int64_t head_rows = source.interleaved_heads > 0 ? tensor.rows() / source.interleaved_heads : 0;
  at::parallel_for(0, count, std::max<int64_t>(1, 32768 / width), [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(width));
    for (int64_t r = begin; r < end; ++r) {
      int64_t from = head_rows > 0 ? SourceRow(first + r, head_rows) : first + r;
      file.DequantizeRows(tensor, from, 1, row.data());
      for (int64_t i = 0; i < width; ++i) out[r * width + i] = at::BFloat16(row[i]);
    }
  });
}

// A bias of interleaved rows: one row in the file, whose elements stand for the rows of the matrix.
void ConvertInterleavedVector(const GgufFile& file, const GgufSource& source, at::BFloat16* out) {
  const int64_t size = source.tensor->row_size();
  std::vector<float> values(static_cast<size_t>(size));
  file.DequantizeRows(*source.tensor, 0, 1, values.data());
  for (int64_t i = 0; i < size; ++i) out[i] = at::BFloat16(values[SourceRow(i, size / source.interleaved_heads)]);
}

Status WriteWeights(const GgufFile& file, const GgufModel& model, const std::filesystem::path& path) {
  std::map<std::string, TensorSpec> specs;
  for (const auto& [name, source] : model.weights) specs[name] = {at::kBFloat16, source.tensor->shape};
  RF_ASSIGN_OR_RETURN(auto writer, SafetensorsWriter::Create(path, specs, {{"format", "pt"}}));
  std::vector<at::BFloat16> part;
  for (const auto& [name, source] : model.weights) {
    const int64_t width = source.tensor->row_size(), rows = source.tensor->rows();
    const bool vector = source.tensor->shape.size() == 1;
    const int64_t step = std::max<int64_t>(1, kPartElements / width);
    for (int64_t first = 0; first < rows; first += step) {
      int64_t count = std::min(step, rows - first);
      part.resize(static_cast<size_t>(count * width));
      if (vector && source.interleaved_heads > 0) {
        ConvertInterleavedVector(file, source, part.data());
      } else {
        ConvertRows(file, source, first, count, part.data());
      }
      RF_RETURN_IF_ERROR(writer->Append({reinterpret_cast<const char*>(part.data()), part.size() * sizeof(part[0])}));
    }
    file.Release(*source.tensor);
  }
  return writer->Finish();
}

}  // namespace

StatusOr<GgufModel> DescribeGgufModel(const GgufFile& file) { return Describer(file).Describe(); }

Status WriteGgufModelFolder(const GgufFile& file, const std::filesystem::path& folder) {
  RF_ASSIGN_OR_RETURN(GgufModel model, DescribeGgufModel(file));
  RF_ASSIGN_OR_RETURN(TokenizerFiles tokenizer, TokenizerFromGguf(file));
  RF_RETURN_IF_ERROR(WriteWeights(file, model, folder / "model.safetensors"));
  RF_RETURN_IF_ERROR(WriteFileAtomically(folder / "config.json", model.config.dump(2) + "\n"));
  RF_RETURN_IF_ERROR(WriteFileAtomically(folder / "generation_config.json", model.generation_config.dump(2) + "\n"));
  RF_RETURN_IF_ERROR(WriteFileAtomically(folder / "tokenizer.json", tokenizer.tokenizer_json));
  return WriteFileAtomically(folder / "tokenizer_config.json", tokenizer.tokenizer_config_json);
}

}  // namespace refinery::checkpoint
