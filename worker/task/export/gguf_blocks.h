// worker/task/export/gguf_blocks.h
//
// Codes and scales of quantized layers as blocks of ggml, and back. Nothing is rounded again but the minimum of Q4_1:
//   Q4_0  4 bits, zero point 8:   d = scale, nibble = code                         d * (q - 8)
//   Q4_1  4 bits, any zero point: d = scale, m = float16(-zero * scale)            d * q + m
//   Q8_0  8 bits, zero point 128: d = scale, byte = code - 128                     d * q
// A group of scales spans whole blocks of 32, each of which repeats its scale; scales may be negative. Only the order of nibbles
// changes: byte j of a block holds value j low and value j + 16 high.
//
// Source: ggml/src/ggml-common.h, ggml-quants.c.
// Shapes: codes [out, in] with in % 32 == 0, rows of blocks [out, in / 32 * bytes of a block] uint8.
// A layer that is none of the three (HasBlocks) stands as its weights, scale * (code - zero), in PlainType.
// Errors: c10::Error for blocks of such a layer (a bug).  Threads: functions.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "worker/task/quantize/gptq.h"

namespace refinery::exporting {

// Whether blocks hold the layer's codes: 4 or 8 bits, columns in their order, groups of whole blocks, no zero points with 8 bits.
bool HasBlocks(const quantize::QuantizedLinear& linear);
// ggml's number of the 16-bit type for the weights of a layer without blocks: F16, which rounds a weight by at most 2^-11 of itself,
// and BF16 where F16 could overflow.
uint32_t PlainType(const quantize::QuantizedLinear& linear);

// ggml's number of the type that holds such a layer.
uint32_t BlockType(const quantize::QuantizedLinear& linear);

at::Tensor EncodeBlocks(const quantize::QuantizedLinear& linear);

struct BlockCodes {
  at::Tensor codes;     // [out, in] uint8, Q8_0's plus 128
  at::Tensor scales;    // d, [out, in / 32] float16
  at::Tensor minimums;  // m, [out, in / 32] float16; undefined but for Q4_1
};
BlockCodes DecodeBlocks(const at::Tensor& rows, uint32_t type);

// Plain rounding to Q8_0 as ggml's reference does it: d = absmax / 127. weights [rows, in] float32 -> blocks.
at::Tensor RoundToQ8_0(const at::Tensor& weights);

// The m of Q4_1, [out, groups] float16.
at::Tensor BlockMinimums(const quantize::QuantizedLinear& linear);

// Row i of the result is row order[i] of HF's Q or K: within each of `heads` heads, row 2j is old row j and row 2j + 1 old row
// j + half. [rows] int64.
at::Tensor InterleavedOrder(int64_t rows, int64_t heads);

}  // namespace refinery::exporting
