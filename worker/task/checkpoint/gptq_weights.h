// worker/task/checkpoint/gptq_weights.h
//
// Weights of a GPTQ checkpoint (qweight, qzeros, scales, g_idx of one linear layer) back to float32.
//
// Source: the layout that AutoGPTQ began and GPTQModel, vLLM and transformers read. qweight [in*bits/32, out] int32
// packs codes along `in`, qzeros [groups, out*bits/32] int32 packs zero points along `out`, least significant bits
// first; 3-bit codes form a dense stream of 32 values in 3 words. "gptq" (v1) stores the zero point minus one,
// "gptq_v2" the zero point.
// Shapes: scales [groups, out] float16, g_idx [in] int32, result [out, in] float32 = scale * (code - zero).
// Errors: DATA_LOSS when shapes or group indices contradict each other.

#pragma once

#include <ATen/core/Tensor.h>

#include "common/status.h"

namespace refinery::checkpoint {

struct GptqFormat {
  int64_t bits = 4;           // 2, 3, 4, 8
  int64_t group_size = -1;    // -1 = one group
  bool zeros_minus_one = true;  // v1
};

struct GptqTensors {
  at::Tensor qweight, qzeros, scales;
  at::Tensor g_idx;  // may be undefined: then input i belongs to group i / group_size
};

// The integers: codes [out, in] uint8, zero points [out, groups] int32.
struct GptqCodes {
  at::Tensor codes, zeros;
};
StatusOr<GptqCodes> UnpackGptq(const GptqTensors& tensors, const GptqFormat& format);

StatusOr<at::Tensor> DequantizeGptq(const GptqTensors& tensors, const GptqFormat& format);

}  // namespace refinery::checkpoint
