// worker/task/model/causal_lm.h
//
// A decoder-only transformer (Llama, SmolLM2, Mistral, Qwen2, Qwen3) as plain ATen calls, in stages that training,
// quantization and decoding share. Everything works under autograd; only LoRA factors ever require a gradient.
//
// Shapes: T tokens of a packed batch, H hidden size, V vocabulary, n/m query/key-value heads, d head_dim.
// Dtypes: weights and activations in the model's dtype; norms, rotary embedding and softmax in float32.
// Errors: c10::Error on shape bugs.  Threads: const methods are thread-safe.

#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/checkpoint/model_folder.h"
#include "worker/task/checkpoint/peft_adapter.h"
#include "worker/task/model/config.h"
#include "worker/task/model/packed_weight.h"

namespace refinery::model {

// y = x W^T + bias [+ lora_scale * (x A^T) B^T].  Adapter factors are float32; their product is cast to x's dtype.
struct Linear {
  std::string name;        // "model.layers.3.self_attn.q_proj"
  at::Tensor weight;       // [out, in]; undefined where the weight is packed
  std::shared_ptr<const PackedWeight> packed;  // or null; expanded for every product but those of decoding
  at::Tensor bias;         // [out] or undefined
  at::Tensor lora_a;       // [r, in]  float32 or undefined
  at::Tensor lora_b;       // [out, r] float32
  double lora_scale = 0;

  int64_t outputs() const { return packed != nullptr ? packed->outputs : weight.size(0); }
  int64_t inputs() const { return packed != nullptr ? packed->inputs : weight.size(1); }
  // The weight; an expanded copy where it is packed.
  at::Tensor Weight(at::ScalarType dtype) const { return packed != nullptr ? packed->Expand(dtype) : weight; }
  at::Tensor operator()(const at::Tensor& x) const;
};

struct DecoderLayer {
  at::Tensor input_norm;            // [H]
  at::Tensor post_attention_norm;   // [H]
  at::Tensor q_norm, k_norm;        // [d], Qwen3 only
  Linear q, k, v, o, gate, up, down;
  int64_t sliding_window = 0;       // tokens that a query sees, itself included; 0 = all before it

  // In GPTQ's order: q k v, o, gate up, down.
  std::vector<Linear*> Linears();
};

// Sequences laid end to end without padding; attention never crosses a border and positions restart at 0.
struct PackedBatch {
  at::Tensor token_ids;             // [T] int64
  std::vector<int64_t> lengths;     // of the sequences, sum T
};

// cos and sin of the rotary embedding, [T, d] float32.
struct Rotary {
  at::Tensor cos, sin;
};

struct LoadOptions {
  at::ScalarType dtype = at::kBFloat16;
  at::Device device = at::kCPU;
  // Quantized weights stay packed where decoding has kernels for them (bfloat16 on the CPU) and their form allows
  // (packed_weight.h); else they are expanded to dtype. For running a model only: nothing trains or merges packed weights.
  bool keep_packed = false;
  // false: only embeddings, final norm and head; the layers come one by one from LoadLayer, for models larger than memory.
  bool layers = true;
};

// The tensor of that name ("model.layers.0.mlp.up_proj.weight"), NOT_FOUND where there is none.
using TensorSource = std::function<StatusOr<at::Tensor>(const std::string& name)>;

// The packed weight of that linear layer ("model.layers.0.mlp.up_proj"), NOT_FOUND where it has to be expanded.
using PackedSource = std::function<StatusOr<std::shared_ptr<const PackedWeight>>(const std::string& name)>;

class CausalLm {
 public:
  // DATA_LOSS / INVALID_ARGUMENT naming the tensor when one is missing or has the wrong shape.
  static StatusOr<std::shared_ptr<CausalLm>> Load(const checkpoint::ModelFolder& folder, const LoadOptions& options);
  // The same from any source. Weights are copied: q k v and gate up of a layer each lie in one storage (see projection.h).
  static StatusOr<std::shared_ptr<CausalLm>> Load(const ModelConfig& config, const TensorSource& source,
                                                  const LoadOptions& options);
  // One layer, in storage of its own that goes when the layer goes.
  static StatusOr<DecoderLayer> LoadLayer(const ModelConfig& config, int64_t index, const TensorSource& source,
                                          const LoadOptions& options);

  // Adds the adapter as factors beside the weights (trainable form). INVALID_ARGUMENT for an unknown module,
  // FAILED_PRECONDITION where factors are attached already (checkpoint::StackAdapters makes one adapter of several).
  Status AttachAdapter(const checkpoint::PeftAdapter& adapter);
  // Merges the adapter into the weights, in place: computed in float32, rounded once to the weights' dtype.
  Status MergeAdapter(const checkpoint::PeftAdapter& adapter);

  const ModelConfig& config() const { return config_; }
  at::Device device() const { return embed_tokens.device(); }
  at::ScalarType dtype() const { return embed_tokens.scalar_type(); }

  // Stages, in the order of a forward pass.
  at::Tensor Embed(const at::Tensor& token_ids) const;                              // [T] -> [T, H]
  // Of whole sequences, whose positions restart at 0. With "dynamic" scaling a sequence longer than max_position turns by the
  // frequencies of its length.
  Rotary MakeRotary(const std::vector<int64_t>& lengths) const;
  // Of tokens at those positions [T] int64 that are decoded one after the other: with "dynamic" scaling a token at or beyond
  // max_position turns by the frequencies of the sequence that ends with it, however prompts are cut into steps. This is what
  // transformers does beyond a prompt of up to max_position tokens; there, a longer prompt turns by its own length at once.
  Rotary MakeRotary(const at::Tensor& positions) const;
  at::Tensor Normalize(const at::Tensor& x, const at::Tensor& weight) const;        // RMS norm
  // q [T, n*d], k and v [T, m*d] before the rotary embedding -> context [T, n*d], causal within each sequence.
  at::Tensor Attend(const DecoderLayer& layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const std::vector<int64_t>& lengths, const Rotary& rotary) const;
  at::Tensor ForwardLayer(const DecoderLayer& layer, const at::Tensor& hidden, const std::vector<int64_t>& lengths,
                          const Rotary& rotary) const;
  // [T, H], after the final norm. `outputs`, where given, gets every layer's output as well, [T, H] each.
  at::Tensor Hidden(const PackedBatch& batch, std::vector<at::Tensor>* outputs = nullptr) const;
  at::Tensor Logits(const at::Tensor& hidden) const;                                // [*, H] -> [*, V], model dtype

  // The linear layer of that name, or nullptr.
  Linear* FindLinear(const std::string& name);
  const Linear* FindLinear(const std::string& name) const;

  at::Tensor embed_tokens;          // [V, H]
  at::Tensor final_norm;            // [H]
  at::Tensor lm_head;               // [V, H]; the same tensor as embed_tokens when tied
  std::vector<DecoderLayer> layers;

 private:
  static StatusOr<std::shared_ptr<CausalLm>> Read(const ModelConfig& config, const TensorSource& source,
                                                  const PackedSource& packed, const LoadOptions& options);
  // The layer an adapter's module names, after checking the factors' shapes.
  StatusOr<Linear*> AdaptedLinear(const std::string& module, const checkpoint::LoraPair& pair);

  // cos and sin of positions [T] times frequencies [d/2] or [T, d/2].
  Rotary Turned(const at::Tensor& positions, const at::Tensor& frequencies) const;

  ModelConfig config_;
  at::Tensor inverse_frequencies_;  // [d/2] float32
  double attention_scaling_ = 1;    // yarn
};

}  // namespace refinery::model
