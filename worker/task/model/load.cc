// How a CausalLm gets its weights: from a folder or any other source of named tensors, and from adapters.

#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include "worker/task/model/causal_lm.h"
#include "worker/task/model/rope.h"
#include "worker/task/model/weight_arena.h"

namespace refinery::model {
namespace {

std::string Shape(at::IntArrayRef sizes) {
  std::string out = "[";
  for (size_t i = 0; i < sizes.size(); ++i) out += Join(i == 0 ? "" : ", ", sizes[i]);
  return out + "]";
}

class Reader {
 public:
  Reader(const TensorSource& source, const PackedSource& packed, const LoadOptions& options)
      : source_(source), packed_(packed), options_(options) {}

  at::Tensor Empty(const std::vector<int64_t>& shape) const {
    if (options_.device.is_cpu()) return arena_.Empty(shape, options_.dtype);
    return at::empty(shape, at::TensorOptions().dtype(options_.dtype).device(options_.device));
  }

  // Copies the tensor of that name into `target`, converting its dtype.
  Status ReadInto(const std::string& name, const at::Tensor& target) const {
    StatusOr<at::Tensor> tensor = source_(name);
    if (!tensor.ok()) {
      if (!absl::IsNotFound(tensor.status())) return tensor.status();
      return DataLoss("tensor '", name, "' is missing from the model's weights");
    }
    if (!at::isFloatingType(tensor->scalar_type())) return InvalidArgument("tensor '", name, "' is not of a float dtype");
    if (tensor->sizes() != target.sizes()) {
      return InvalidArgument("tensor '", name, "' has shape ", Shape(tensor->sizes()), ", but config.json implies ",
                             Shape(target.sizes()));
    }
    target.copy_(*tensor);
    return absl::OkStatus();
  }

  StatusOr<at::Tensor> Read(const std::string& name, const std::vector<int64_t>& shape) const {
    const at::Tensor target = Empty(shape);
    RF_RETURN_IF_ERROR(ReadInto(name, target));
    return target;
  }

  struct Part {
    Linear* linear;
    const char* suffix;  // "self_attn.q_proj"
    int64_t outputs;
    bool bias;
  };

  // Reads layers with the same input into one storage, so that they can be multiplied at once.
  Status ReadStacked(const std::string& prefix, const std::vector<Part>& parts, int64_t inputs) const {
    int64_t rows = 0;
    for (const Part& part : parts) {
      part.linear->name = prefix + part.suffix;
      rows += part.outputs;
    }
    RF_ASSIGN_OR_RETURN(const bool packed, ReadPacked(parts, inputs));
    const at::Tensor weight = packed ? at::Tensor() : Empty({rows, inputs}), bias = Empty({rows});
    int64_t row = 0;
    for (const Part& part : parts) {
      Linear& linear = *part.linear;
      if (!packed) {
        linear.weight = weight.narrow(0, row, part.outputs);
        RF_RETURN_IF_ERROR(ReadInto(linear.name + ".weight", linear.weight));
      }
      if (part.bias) {
        linear.bias = bias.narrow(0, row, part.outputs);
        RF_RETURN_IF_ERROR(ReadInto(linear.name + ".bias", linear.bias));
      }
      row += part.outputs;
    }
    return absl::OkStatus();
  }

 private:
  // Whether all parts came packed; where one does not, none stays so.
  StatusOr<bool> ReadPacked(const std::vector<Part>& parts, int64_t inputs) const {
    if (!packed_) return false;
    for (const Part& part : parts) {
      StatusOr<std::shared_ptr<const PackedWeight>> packed = packed_(part.linear->name);
      if (absl::IsNotFound(packed.status())) {
        for (const Part& other : parts) other.linear->packed = nullptr;
        return false;
      }
      RF_RETURN_IF_ERROR(packed.status());
      if ((*packed)->outputs != part.outputs || (*packed)->inputs != inputs) {
        return InvalidArgument("the quantized weight of '", part.linear->name, "' has shape ",
                               Shape({(*packed)->outputs, (*packed)->inputs}), ", but config.json implies ",
                               Shape({part.outputs, inputs}));
      }
      part.linear->packed = *std::move(packed);
    }
    return true;
  }

  const TensorSource& source_;
  const PackedSource& packed_;
  const LoadOptions& options_;
  mutable WeightArena arena_;
};

Status ReadLayer(const Reader& reader, const ModelConfig& c, const std::string& prefix, DecoderLayer& layer) {
  const int64_t h = c.hidden_size, i = c.intermediate_size, q = c.num_heads * c.head_dim, kv = c.num_kv_heads * c.head_dim;
  RF_ASSIGN_OR_RETURN(layer.input_norm, reader.Read(prefix + "input_layernorm.weight", {h}));
  RF_ASSIGN_OR_RETURN(layer.post_attention_norm, reader.Read(prefix + "post_attention_layernorm.weight", {h}));
  if (c.qk_norm) {
    RF_ASSIGN_OR_RETURN(layer.q_norm, reader.Read(prefix + "self_attn.q_norm.weight", {c.head_dim}));
    RF_ASSIGN_OR_RETURN(layer.k_norm, reader.Read(prefix + "self_attn.k_norm.weight", {c.head_dim}));
  }
  RF_RETURN_IF_ERROR(reader.ReadStacked(prefix,
                                        {{&layer.q, "self_attn.q_proj", q, c.attention_bias},
                                         {&layer.k, "self_attn.k_proj", kv, c.attention_bias},
                                         {&layer.v, "self_attn.v_proj", kv, c.attention_bias}},
                                        h));
  RF_RETURN_IF_ERROR(reader.ReadStacked(prefix, {{&layer.o, "self_attn.o_proj", h, c.attention_output_bias}}, q));
  RF_RETURN_IF_ERROR(reader.ReadStacked(
      prefix, {{&layer.gate, "mlp.gate_proj", i, c.mlp_bias}, {&layer.up, "mlp.up_proj", i, c.mlp_bias}}, h));
  return reader.ReadStacked(prefix, {{&layer.down, "mlp.down_proj", h, c.mlp_bias}}, i);
}

}  // namespace

StatusOr<std::shared_ptr<CausalLm>> CausalLm::Load(const checkpoint::ModelFolder& folder, const LoadOptions& options) {
  const std::string where = folder.path().string();
  StatusOr<ModelConfig> config = ModelConfig::FromJson(folder.config());
  if (!config.ok()) return Annotate(config.status(), where);
  WeightArena arena;
  const PackedSource packed = [&](const std::string& name) -> StatusOr<std::shared_ptr<const PackedWeight>> {
    RF_ASSIGN_OR_RETURN(const checkpoint::GptqTensors tensors, folder.GetGptq(name));
    const checkpoint::GptqFormat format = folder.GptqFormatOf(name);
    if (!PackedWeight::Takes(tensors, format)) return NotFound(name, " cannot stay packed");
    return PackedWeight::Pack(tensors, format, arena);
  };
  const bool keep = options.keep_packed && folder.gptq() && options.dtype == at::kBFloat16 && options.device.is_cpu();
  StatusOr<std::shared_ptr<CausalLm>> model =
      Read(*config, [&](const std::string& name) { return folder.Get(name); }, keep ? packed : PackedSource(), options);
  if (!model.ok()) return Annotate(model.status(), where);
  return model;
}

StatusOr<std::shared_ptr<CausalLm>> CausalLm::Load(const ModelConfig& config, const TensorSource& source,
                                                   const LoadOptions& options) {
  return Read(config, source, {}, options);
}

StatusOr<std::shared_ptr<CausalLm>> CausalLm::Read(const ModelConfig& config, const TensorSource& source,
                                                   const PackedSource& packed, const LoadOptions& options) {
  const c10::InferenceMode off(false);
  const at::NoGradGuard no_grad;
  const Reader reader(source, packed, options);
  auto model = std::make_shared<CausalLm>();
  model->config_ = config;
  const RopeFrequencies rope = MakeRopeFrequencies(config);
  model->inverse_frequencies_ = rope.inverse.to(options.device);
  model->attention_scaling_ = rope.scaling;
  const std::vector<int64_t> table = {config.vocab_size, config.hidden_size};
  RF_ASSIGN_OR_RETURN(model->embed_tokens, reader.Read("model.embed_tokens.weight", table));
  RF_ASSIGN_OR_RETURN(model->final_norm, reader.Read("model.norm.weight", {config.hidden_size}));
  model->lm_head = model->embed_tokens;
  if (!config.tie_word_embeddings) {
    RF_ASSIGN_OR_RETURN(model->lm_head, reader.Read("lm_head.weight", table));
  }
  if (!options.layers) return model;
  model->layers.resize(static_cast<size_t>(config.num_layers));
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const std::string prefix = Join("model.layers.", i, ".");
    DecoderLayer& layer = model->layers[static_cast<size_t>(i)];
    layer.sliding_window = config.WindowOf(i);
    RF_RETURN_IF_ERROR(ReadLayer(reader, config, prefix, layer));
  }
  return model;
}

StatusOr<DecoderLayer> CausalLm::LoadLayer(const ModelConfig& config, int64_t index, const TensorSource& source,
                                           const LoadOptions& options) {
  const c10::InferenceMode off(false);
  const at::NoGradGuard no_grad;
  const PackedSource unpacked;
  DecoderLayer layer;
  layer.sliding_window = config.WindowOf(index);
  RF_RETURN_IF_ERROR(ReadLayer(Reader(source, unpacked, options), config, Join("model.layers.", index, "."), layer));
  return layer;
}

StatusOr<Linear*> CausalLm::AdaptedLinear(const std::string& module, const checkpoint::LoraPair& pair) {
  Linear* linear = FindLinear(module);
  if (linear == nullptr) {
    return InvalidArgument("the adapter names '", module, "', which is not a linear layer of this model (layers are named like '",
                           layers.front().q.name, "')");
  }
  if (linear->packed != nullptr) {
    return InvalidArgument("the adapter names '", module, "', whose weight is packed; load the model without keep_packed to adapt it");
  }
  if (pair.a.dim() != 2 || pair.b.dim() != 2 || pair.a.size(1) != linear->weight.size(1) ||
      pair.b.size(0) != linear->weight.size(0) || pair.a.size(0) != pair.b.size(1)) {
    return InvalidArgument("the adapter's factors for '", module, "' have shapes ", Shape(pair.a.sizes()), " and ",
                           Shape(pair.b.sizes()), ", which do not fit the weight ", Shape(linear->weight.sizes()));
  }
  return linear;
}

Status CausalLm::AttachAdapter(const checkpoint::PeftAdapter& adapter) {
  for (const auto& [module, pair] : adapter.pairs) {
    RF_ASSIGN_OR_RETURN(const Linear* linear, AdaptedLinear(module, pair));
    if (linear->lora_a.defined()) return FailedPrecondition("'", module, "' has an adapter already; stack the adapters first");
  }
  for (const auto& [module, pair] : adapter.pairs) {
    Linear* linear = FindLinear(module);
    linear->lora_a = pair.a.to(device(), at::kFloat);
    linear->lora_b = pair.b.to(device(), at::kFloat);
    linear->lora_scale = adapter.scale();
  }
  return absl::OkStatus();
}

Status CausalLm::MergeAdapter(const checkpoint::PeftAdapter& adapter) {
  for (const auto& [module, pair] : adapter.pairs) RF_RETURN_IF_ERROR(AdaptedLinear(module, pair).status());
  const at::NoGradGuard no_grad;
  for (const auto& [module, pair] : adapter.pairs) {
    const at::Tensor& weight = FindLinear(module)->weight;
    weight.copy_(checkpoint::MergeLora(weight, {pair.a.to(device()), pair.b.to(device())}, adapter.scale()));
  }
  return absl::OkStatus();
}

}  // namespace refinery::model
