// worker/task/families/family.h
//
// The families of decoder-only transformers that Refinery runs. All share one forward pass (worker/task/model); a family is
// one small file in this folder that says what differs. CONTRIBUTING.md shows how to add one.
//
// Source: the configuration and model classes of transformers 5.23; for GGUF, llama.cpp's convert_hf_to_gguf.py.
// Errors: none here; readers refuse an unknown name with Known...().  Threads: constants only.

#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace refinery::families {

// Whether linear layers have a bias.
enum class Bias {
  kNever,
  kAlways,
  kConfigured,  // as config.json says: "attention_bias" for attention, "mlp_bias" for the feed-forward layers; false if silent
};

// Which layers attend within a sliding window only.
enum class Window {
  kNone,        // "sliding_window" is not read
  kEveryLayer,  // every layer, unless "sliding_window" is null
  kByLayer,     // if "use_sliding_window": the layers that "layer_types" names, else those from "max_window_layers" on
};

struct Family {
  std::string_view architecture;   // in config.json: "LlamaForCausalLM"
  std::string_view model_type;     // "llama"

  // Where config.json is silent.
  int64_t default_kv_heads = 0;    // 0: as many as query heads
  int64_t default_head_dim = 0;    // 0: hidden_size / num_attention_heads
  int64_t default_window = 0;      // tokens

  Bias qkv_bias = Bias::kNever;
  Bias output_bias = Bias::kNever;  // of the attention's output projection
  Bias mlp_bias = Bias::kNever;
  bool qk_norm = false;             // RMS norm of each query and key head before the rotary embedding
  Window window = Window::kNone;

  std::string_view gguf;            // general.architecture of its GGUF files; empty: has none of its own
  bool gguf_interleaved = false;    // GGUF files hold the rows of Q and K in ggml's rotary order
};

// nullptr when there is none.
const Family* FindArchitecture(std::string_view architecture);
const Family* FindGguf(std::string_view architecture);

// "LlamaForCausalLM, MistralForCausalLM, ..." for error messages.
std::string KnownArchitectures();
std::string KnownGgufArchitectures();

std::span<const Family* const> AllFamilies();

}  // namespace refinery::families
