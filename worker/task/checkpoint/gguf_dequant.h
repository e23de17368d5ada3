// worker/task/checkpoint/gguf_dequant.h
//
// The block formats of ggml and their exact values in float32.
//
// Source: ggml/src/ggml-quants.c and ggml-common.h (the block layouts); bit-equal to gguf-py 0.19 (gguf/quants.py),
// which the vectors in tests/vectors/gguf come from. Products and differences are rounded one by one: no fused
// multiply-add.

#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace refinery::checkpoint {

struct GgufType {
  uint32_t id;                // ggml's number
  std::string_view name;      // "Q4_K"
  int64_t block_size;         // elements in a block
  int64_t block_bytes;
  // Blocks at `blocks` (any alignment) -> count * block_size floats.
  void (*dequantize)(const uint8_t* blocks, int64_t count, float* out);
};

// nullptr for types that are not read.
const GgufType* FindGgufType(uint32_t id);
// "F32, F16, ..." for error messages.
std::string KnownGgufTypes();

}  // namespace refinery::checkpoint
