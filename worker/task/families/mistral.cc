// Mistral: Llama without biases, with a sliding window. Its GGUF files call themselves llama and drop the window.

#include "worker/task/families/family.h"

namespace refinery::families {

extern const Family kMistral;
const Family kMistral = {
    .architecture = "MistralForCausalLM",
    .model_type = "mistral",
    .default_kv_heads = 8,
    .default_window = 4096,
    .window = Window::kEveryLayer,
};

}  // namespace refinery::families
