// Llama 2, 3, 3.1, 3.2 and what copies them, such as SmolLM2.

#include "worker/task/families/family.h"

namespace refinery::families {

extern const Family kLlama;
const Family kLlama = {
    .architecture = "LlamaForCausalLM",
    .model_type = "llama",
    .qkv_bias = Bias::kConfigured,
    .output_bias = Bias::kConfigured,
    .mlp_bias = Bias::kConfigured,
    .gguf = "llama",
    .gguf_interleaved = true,
};

}  // namespace refinery::families
