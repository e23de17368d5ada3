// Names and keys as llama.cpp's convert_hf_to_gguf.py writes them.

#include "worker/task/runtime/torch.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>

#include "common/files.h"
#include "worker/task/checkpoint/gguf.h"
#include "worker/task/checkpoint/gguf_writer.h"
#include "worker/task/export/export.h"
#include "worker/task/export/folder_files.h"
#include "worker/task/export/gguf_blocks.h"
#include "worker/task/export/gguf_vocabulary.h"
#include "worker/task/export/parts.h"
#include "worker/task/families/family.h"

namespace refinery::exporting {
namespace {

using checkpoint::GgufNewMetadata;
using checkpoint::GgufNewTensor;
using model::ModelConfig;
using quantize::QuantizedLinear;

constexpr char kFile[] = "model.gguf";

struct Part {
  GgufNewTensor tensor;
  std::function<StatusOr<at::Tensor>()> make;  // its bytes
  const QuantizedLinear* linear = nullptr;     // of codes
  bool blocks = false;                         // which stand in it as they are
  std::string module;
  at::Tensor order;                            // row i of the file is row order[i]; undefined: as they are
};

// Mistral has no name of its own: it is a llama with a window.
const families::Family& GgufFamily(const ModelConfig& config) {
  const families::Family* family = families::FindArchitecture(config.architecture);
  TORCH_CHECK(family != nullptr, "ModelConfig knows the architecture");
  return family->gguf.empty() ? *families::FindGguf("llama") : *family;
}

class Collector {
 public:
  Collector(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized, const ModelConfig& config,
            const GgufOptions& options)
      : base_(base), quantized_(quantized), config_(config), options_(options), interleaved_(GgufFamily(config).gguf_interleaved) {}

  StatusOr<std::vector<Part>> Collect() {
    RF_RETURN_IF_ERROR(Matrix("model.embed_tokens", "token_embd", options_.embeddings_q8_0));
    for (int64_t layer = 0; layer < config_.num_layers; ++layer) RF_RETURN_IF_ERROR(Layer(layer));
    RF_RETURN_IF_ERROR(Vector("model.norm.weight", "output_norm.weight"));
    if (!config_.tie_word_embeddings) {
      if (quantized_.linears.contains("lm_head")) {
        Codes("lm_head", "output", 0);
      } else {
        RF_RETURN_IF_ERROR(Matrix("lm_head", "output", options_.head_q8_0));
      }
    }
    if (config_.rope_scaling.type == "llama3") RopeDivisors();
    return std::move(parts_);
  }

 private:
  // All seven are quantized: CheckModules has seen to it.
  Status Layer(int64_t layer) {
    const std::string from = Join("model.layers.", layer, "."), to = Join("blk.", layer, ".");
    RF_RETURN_IF_ERROR(Vector(from + "input_layernorm.weight", to + "attn_norm.weight"));
    RF_RETURN_IF_ERROR(Vector(from + "post_attention_layernorm.weight", to + "ffn_norm.weight"));
    RF_RETURN_IF_ERROR(Linear(from + "self_attn.q_proj", to + "attn_q", config_.num_heads));
    RF_RETURN_IF_ERROR(Linear(from + "self_attn.k_proj", to + "attn_k", config_.num_kv_heads));
    RF_RETURN_IF_ERROR(Linear(from + "self_attn.v_proj", to + "attn_v", 0));
    RF_RETURN_IF_ERROR(Linear(from + "self_attn.o_proj", to + "attn_output", 0));
    RF_RETURN_IF_ERROR(Linear(from + "mlp.gate_proj", to + "ffn_gate", 0));
    RF_RETURN_IF_ERROR(Linear(from + "mlp.up_proj", to + "ffn_up", 0));
    RF_RETURN_IF_ERROR(Linear(from + "mlp.down_proj", to + "ffn_down", 0));
    if (!config_.qk_norm) return absl::OkStatus();
    RF_RETURN_IF_ERROR(Vector(from + "self_attn.q_norm.weight", to + "attn_q_norm.weight"));
    return Vector(from + "self_attn.k_norm.weight", to + "attn_k_norm.weight");
  }

  // heads > 0: Q or K, whose rows ggml's rotary embedding wants interleaved.
  Status Linear(const std::string& module, const std::string& name, int64_t heads) {
    Codes(module, name, heads);
    if (!base_.Has(module + ".bias")) return absl::OkStatus();
    return Vector(module + ".bias", name + ".bias", heads);
  }

  void Codes(const std::string& module, const std::string& name, int64_t heads) {
    const QuantizedLinear& linear = quantized_.linears.at(module);
    const bool blocks = HasBlocks(linear);
    Part part{.tensor = {.name = name + ".weight", .type = blocks ? BlockType(linear) : PlainType(linear), .shape = linear.codes.sizes().vec()},
              .linear = &linear, .blocks = blocks, .module = module, .order = Order(linear.codes.size(0), heads)};
    const at::ScalarType plain = part.tensor.type == checkpoint::kGgufF16 ? at::kHalf : at::kBFloat16;
    part.make = [&linear, blocks, plain, order = part.order]() -> StatusOr<at::Tensor> {
      const at::Tensor rows = blocks ? EncodeBlocks(linear) : linear.Dequantize().to(plain);
      return order.defined() ? rows.index_select(0, order) : rows;
    };
    parts_.push_back(std::move(part));
  }

  at::Tensor Order(int64_t rows, int64_t heads) const {
    return interleaved_ && heads > 0 ? InterleavedOrder(rows, heads) : at::Tensor();
  }

  // Norms and biases, in float32.
  Status Vector(const std::string& from, const std::string& name, int64_t heads = 0) {
    RF_ASSIGN_OR_RETURN(const at::Tensor tensor, KeptTensor(base_, quantized_, from));
    const at::Tensor order = Order(tensor.size(0), heads);
    const at::Tensor values = order.defined() ? tensor.index_select(0, order) : tensor;
    parts_.push_back({.tensor = {.name = name, .type = checkpoint::kGgufF32, .shape = tensor.sizes().vec()},
                      .make = [values]() -> StatusOr<at::Tensor> { return values.to(at::kFloat); }});
    return absl::OkStatus();
  }

  // Embeddings and head. Float32 becomes bfloat16, as wherever Refinery loads a model: those weights were measured.
  Status Matrix(const std::string& from, const std::string& name, bool q8_0) {
    RF_ASSIGN_OR_RETURN(const at::Tensor tensor, KeptTensor(base_, quantized_, from + ".weight"));
    const at::ScalarType dtype = tensor.scalar_type() == at::kHalf ? at::kHalf : at::kBFloat16;
    const uint32_t type = q8_0 ? checkpoint::kGgufQ8_0 : dtype == at::kHalf ? checkpoint::kGgufF16 : checkpoint::kGgufBf16;
    parts_.push_back({.tensor = {.name = name + ".weight", .type = type, .shape = tensor.sizes().vec()},
                      .make = [this, from, dtype, q8_0]() -> StatusOr<at::Tensor> {
                        RF_ASSIGN_OR_RETURN(const at::Tensor kept, KeptTensor(base_, quantized_, from + ".weight"));
                        return q8_0 ? RoundToQ8_0(kept.to(dtype).to(at::kFloat)) : kept.to(dtype);
                      }});
    return absl::OkStatus();
  }

  // Llama 3.1's scaling: what each frequency is divided by.
  void RopeDivisors() {
    const model::RopeScaling& s = config_.rope_scaling;
    const auto original = static_cast<double>(s.original_max_position);
    std::vector<float> divisors;
    for (int64_t i = 0; i < config_.head_dim; i += 2) {
      const double wavelength = 2 * M_PI * std::pow(config_.rope_theta, static_cast<double>(i) / static_cast<double>(config_.head_dim));
      const double smooth = (original / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
      divisors.push_back(static_cast<float>(wavelength < original / s.high_freq_factor  ? 1
                                            : wavelength > original / s.low_freq_factor ? s.factor
                                                                                        : 1 / ((1 - smooth) / s.factor + smooth)));
    }
    const at::Tensor values = at::tensor(divisors, at::kFloat);
    parts_.push_back({.tensor = {.name = "rope_freqs.weight", .type = checkpoint::kGgufF32, .shape = values.sizes().vec()},
                      .make = [values]() -> StatusOr<at::Tensor> { return values; }});
  }

  const checkpoint::ModelFolder& base_;
  const quantize::QuantizedModel& quantized_;
  const ModelConfig& config_;
  const GgufOptions& options_;
  const bool interleaved_;
  std::vector<Part> parts_;
};

// Tokens for which llama.cpp, which knows no window for these families, computes what the model does.
int64_t ContextLength(const ModelConfig& config) {
  int64_t length = config.max_position;
  for (int64_t layer = 0; layer < config.num_layers; ++layer)
    if (config.WindowOf(layer) > 0) length = std::min(length, config.WindowOf(layer));
  return length;
}

// llama.cpp's enum of what most of a file is.
uint32_t FileType(const std::vector<Part>& parts) {
  std::map<uint32_t, uint64_t> bytes;
  for (const Part& part : parts)
    if (part.linear != nullptr) bytes[part.tensor.type] += part.tensor.bytes();
  const auto most = std::max_element(bytes.begin(), bytes.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  switch (most->first) {
    case checkpoint::kGgufQ8_0: return 7;
    case checkpoint::kGgufBf16: return 32;
    default: return most->first;  // F16 is 1, Q4_0 2 and Q4_1 3 in both enums
  }
}

std::string SizeLabel(const checkpoint::ModelFolder& base) {
  const double parameters = static_cast<double>(base.ParameterCount());
  char text[32];
  std::snprintf(text, sizeof text, parameters < 1e9 ? "%.0fM" : "%.1fB", parameters < 1e9 ? parameters / 1e6 : parameters / 1e9);
  return text;
}

void AddRope(const std::string& prefix, const ModelConfig& c, GgufNewMetadata* out) {
  const auto add = [&](const char* key, checkpoint::GgufNewValue value) { out->emplace_back(prefix + key, std::move(value)); };
  add("rope.dimension_count", static_cast<uint32_t>(c.head_dim));
  add("rope.freq_base", static_cast<float>(c.rope_theta));
  if (c.rope_scaling.type != "linear" && c.rope_scaling.type != "yarn") return;
  add("rope.scaling.type", c.rope_scaling.type);
  add("rope.scaling.factor", static_cast<float>(c.rope_scaling.factor));
  if (c.rope_scaling.type == "yarn")
    add("rope.scaling.original_context_length", static_cast<uint32_t>(c.rope_scaling.original_max_position));
}

StatusOr<GgufNewMetadata> Metadata(const checkpoint::ModelFolder& base, const ModelConfig& c, const ModelCard& card,
                                   const quantize::QuantizedModel& quantized, const std::vector<Part>& parts) {
  const std::string architecture(GgufFamily(c).gguf), prefix = architecture + ".";
  GgufNewMetadata out;
  out.emplace_back("general.architecture", architecture);
  out.emplace_back("general.type", std::string("model"));
  out.emplace_back("general.name", card.name.empty() ? std::string("model") : card.name);
  if (!card.license.empty()) out.emplace_back("general.license", card.license);
  out.emplace_back("general.size_label", SizeLabel(base));
  out.emplace_back("general.quantized_by", Join("refinery ", REFINERY_VERSION));
  out.emplace_back("refinery.provenance", Provenance(quantized).dump());
  out.emplace_back("general.quantization_version", uint32_t{2});
  out.emplace_back("general.file_type", FileType(parts));
  const auto add = [&](const char* key, int64_t value) { out.emplace_back(prefix + key, static_cast<uint32_t>(value)); };
  add("context_length", ContextLength(c));
  add("embedding_length", c.hidden_size);
  add("block_count", c.num_layers);
  add("feed_forward_length", c.intermediate_size);
  add("attention.head_count", c.num_heads);
  add("attention.head_count_kv", c.num_kv_heads);
  add("attention.key_length", c.head_dim);
  add("attention.value_length", c.head_dim);
  add("vocab_size", c.vocab_size);
  out.emplace_back(prefix + "attention.layer_norm_rms_epsilon", static_cast<float>(c.rms_norm_eps));
  AddRope(prefix, c, &out);
  RF_ASSIGN_OR_RETURN(GgufNewMetadata tokenizer, GgufVocabulary(base.path(), c.vocab_size));
  out.insert(out.end(), std::make_move_iterator(tokenizer.begin()), std::make_move_iterator(tokenizer.end()));
  return out;
}

ModelBytes Measure(const quantize::QuantizedModel& quantized, const std::vector<Part>& parts) {
  std::vector<std::pair<std::string, uint64_t>> tensors;
  std::set<std::string> linears;
  for (const Part& part : parts) {
    tensors.emplace_back(part.tensor.name, part.tensor.bytes());
    if (part.linear != nullptr) linears.insert(part.tensor.name);
  }
  return SumBytes(quantized, tensors, [&](const std::string& name) { return linears.contains(name); },
                  [](const std::string& name) { return name == "token_embd.weight" || name == "output.weight"; });
}

// The tensor's rows as bytes, a copy.
at::Tensor RowsOf(const checkpoint::GgufFile& file, const checkpoint::GgufTensor& tensor) {
  const auto size = static_cast<int64_t>(tensor.end - tensor.begin);
  at::Tensor bytes = at::empty({tensor.rows(), size / tensor.rows()}, at::kByte);
  std::memcpy(bytes.mutable_data_ptr(), file.Data(tensor), static_cast<size_t>(size));
  return bytes;
}

// Codes back to their places in HF's order, scales and minimums back to one per group, each of whose blocks must agree.
Status CompareBlocks(const std::string& path, const Part& part, const at::Tensor& rows) {
  const QuantizedLinear& linear = *part.linear;
  BlockCodes read = DecodeBlocks(rows, part.tensor.type);
  const auto restore = [&](const at::Tensor& tensor) {
    return part.order.defined() ? tensor.index_select(0, part.order.argsort()) : tensor;
  };
  const at::Tensor scales = restore(read.scales);
  const at::Tensor first = at::arange(linear.scales.size(1), at::kLong) * (linear.group_size / 32);
  const auto groups = [&](const at::Tensor& tensor) { return tensor.index_select(1, first).contiguous(); };
  const auto spread = [&](const at::Tensor& tensor) {
    return tensor.repeat_interleave(linear.group_size / 32, 1).narrow(1, 0, scales.size(1)).contiguous();
  };
  RF_RETURN_IF_ERROR(CompareCodes(path, part.module, linear, restore(read.codes), groups(scales), ZerosOf(linear)));
  if (!SameBytes(scales, spread(linear.scales.cpu())) ||
      (read.minimums.defined() && !SameBytes(restore(read.minimums), spread(BlockMinimums(linear)))))
    return DataLoss(path, ": the blocks of ", part.module, " do not read back as they were written");
  return absl::OkStatus();
}

}  // namespace

Status ExportGgufFolder(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& source, const ModelCard& card,
                        const GgufOptions& options, const std::filesystem::path& folder) {
  RF_RETURN_IF_ERROR(CheckModules(base, source, Format::kGguf));
  const quantize::QuantizedModel quantized = Widened(source);
  RF_ASSIGN_OR_RETURN(const ModelConfig config, ModelConfig::FromJson(base.config()));
  return WriteWholeFolder(folder, [&](const std::filesystem::path& partial) -> Status {
    Collector collector(base, quantized, config, options);
    RF_ASSIGN_OR_RETURN(const std::vector<Part> parts, collector.Collect());
    RF_ASSIGN_OR_RETURN(const GgufNewMetadata metadata, Metadata(base, config, card, quantized, parts));
    std::vector<GgufNewTensor> tensors;
    for (const Part& part : parts) tensors.push_back(part.tensor);
    RF_ASSIGN_OR_RETURN(const auto writer, checkpoint::GgufWriter::Create(partial / kFile, metadata, tensors));
    for (const Part& part : parts) {
      RF_ASSIGN_OR_RETURN(at::Tensor bytes, part.make());
      bytes = bytes.cpu().contiguous();
      RF_RETURN_IF_ERROR(writer->Append({static_cast<const char*>(bytes.const_data_ptr()), bytes.nbytes()}));
    }
    RF_RETURN_IF_ERROR(writer->Finish());
    RF_RETURN_IF_ERROR(WriteModelCard(Kind::kGguf, card, QuantizedFacts(quantized), partial));
    RF_RETURN_IF_ERROR(VerifyGgufFolder(base, quantized, options, partial));
    const ModelBytes bytes = Measure(quantized, parts);
    return WriteManifest(partial, &bytes);
  });
}

Status VerifyGgufFolder(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& source, const GgufOptions& options,
                        const std::filesystem::path& folder) {
  const quantize::QuantizedModel quantized = Widened(source);
  const std::string path = (folder / kFile).string();
  RF_ASSIGN_OR_RETURN(const ModelConfig config, ModelConfig::FromJson(base.config()));
  RF_ASSIGN_OR_RETURN(const auto file, checkpoint::GgufFile::Open(folder / kFile));
  Collector collector(base, quantized, config, options);
  RF_ASSIGN_OR_RETURN(const std::vector<Part> parts, collector.Collect());
  for (const Part& part : parts) {
    const checkpoint::GgufTensor* found = file->Find(part.tensor.name);
    if (found == nullptr || found->type->id != part.tensor.type || found->shape != part.tensor.shape)
      return DataLoss(path, ": the tensor ", part.tensor.name, " does not read back as it was written");
    const at::Tensor rows = RowsOf(*file, *found);
    if (part.blocks) {
      RF_RETURN_IF_ERROR(CompareBlocks(path, part, rows));
      continue;
    }
    RF_ASSIGN_OR_RETURN(const at::Tensor wanted, part.make());
    const at::Tensor bytes = wanted.contiguous();
    if (bytes.nbytes() != rows.nbytes() || std::memcmp(bytes.const_data_ptr(), rows.const_data_ptr(), rows.nbytes()) != 0)
      return DataLoss(path, ": the tensor ", part.tensor.name, " does not read back as it was written");
  }
  if (file->tensors().size() != parts.size()) return DataLoss(path, ": holds ", file->tensors().size(), " tensors, not ", parts.size());
  return absl::OkStatus();
}

}  // namespace refinery::exporting
