// worker/task/checkpoint/gguf_tokenizer.h
//
// tokenizer.json and tokenizer_config.json rebuilt from the vocabulary inside a GGUF file.
//
// Two kinds. Byte-level BPE (tokenizer.ggml.model "gpt2") with the pre-tokenizers of GPT-2, SmolLM, Qwen2 and Llama 3:
// the result splits and merges exactly as the model's own Hugging Face tokenizer. SentencePiece BPE ("llama"): pieces
// with scores become the merges of Hugging Face's conversion, with byte fallback and the blank before a text
// (add_space_prefix). Token ids are those of the GGUF file. Control, unknown and user-defined tokens are found in texts
// as they stand. Tokens that only fill the embedding up (type "unused") are left out, as in the original files.
// Source: llama.cpp's convert_hf_to_gguf.py (what the fields mean), the tokenizer.json files of the named models.
// Errors: INVALID_ARGUMENT for other tokenizers, DATA_LOSS for contradictory vocabularies; both name the file.

#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "common/status.h"
#include "worker/task/checkpoint/gguf.h"

namespace refinery::checkpoint {

struct TokenizerFiles {
  std::string tokenizer_json;
  std::string tokenizer_config_json;  // with the chat template, when the file has one
};

StatusOr<TokenizerFiles> TokenizerFromGguf(const GgufFile& file);

// The other way: tokenizer.ggml.pre for a byte-level tokenizer.json that splits texts as one of the named pre-tokenizers;
// nullopt where it splits in another way.
std::optional<std::string_view> GgufPreTokenizer(const nlohmann::json& tokenizer);

}  // namespace refinery::checkpoint
