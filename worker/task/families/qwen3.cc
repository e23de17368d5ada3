// Qwen3: norms on query and key heads instead of biases; heads of 128 whatever the hidden size.

#include "worker/task/families/family.h"

namespace refinery::families {

extern const Family kQwen3;
const Family kQwen3 = {
    .architecture = "Qwen3ForCausalLM",
    .model_type = "qwen3",
    .default_kv_heads = 32,
    .default_head_dim = 128,
    .default_window = 4096,
    .qkv_bias = Bias::kConfigured,
    .output_bias = Bias::kConfigured,
    .qk_norm = true,
    .window = Window::kByLayer,
    .gguf = "qwen3",
};

}  // namespace refinery::families
