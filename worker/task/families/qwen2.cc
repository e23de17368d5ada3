// Qwen2 and Qwen2.5: biases on q, k and v, none on the output; a sliding window for some layers, off in every release.

#include "worker/task/families/family.h"

namespace refinery::families {

extern const Family kQwen2;
const Family kQwen2 = {
    .architecture = "Qwen2ForCausalLM",
    .model_type = "qwen2",
    .default_kv_heads = 32,
    .default_window = 4096,
    .qkv_bias = Bias::kAlways,
    .window = Window::kByLayer,
    .gguf = "qwen2",
};

}  // namespace refinery::families
