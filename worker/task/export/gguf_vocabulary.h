// worker/task/export/gguf_vocabulary.h
//
// The tokenizer of a Hugging Face folder as the metadata of a GGUF file: tokenizer.ggml.* and tokenizer.chat_template.
//
// Byte-level BPE (model "gpt2") whose pre-tokenizer is one that gguf_tokenizer.h names, with its merges. SentencePiece BPE with
// byte fallback (model "llama"): llama.cpp joins neighbours by scores, which are made from the merges: the earlier a piece can
// be made, the higher its score. Ids without a token up to the number of embeddings become [PAD<id>], type "unused".
// Source: llama.cpp's convert_hf_to_gguf.py (what the keys mean).
// Errors: INVALID_ARGUMENT naming the file for a tokenizer that GGUF cannot hold, DATA_LOSS for a contradictory one.

#pragma once

#include <filesystem>

#include "common/status.h"
#include "worker/task/checkpoint/gguf_writer.h"

namespace refinery::exporting {

// `vocab_size`: rows of the embeddings.
StatusOr<checkpoint::GgufNewMetadata> GgufVocabulary(const std::filesystem::path& folder, int64_t vocab_size);

}  // namespace refinery::exporting
