// worker/task/model/causal_attention.h
//
// Rotary embedding and causal attention of whole sequences by the kernels of pair_attention.h: PackedAttention (ops.h) for passes
// without gradient in bfloat16. LibTorch's flash attention takes its products through float32 on CPUs without AMX.
//
// A sequence's result is the same to the last bit whatever shares the call and however many threads there are.
// Errors: c10::Error on shape bugs (checked by PackedAttention).  Threads: thread-safe.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "worker/task/model/ops.h"

namespace refinery::model {

// bfloat16 on a CPU with AVX512_BF16, and nobody asks for gradients.
bool TakesCausalAttention(const at::Tensor& qkv, const AttentionShape& shape);

// As PackedAttention. cos and sin contiguous.
at::Tensor CausalAttention(const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin, const std::vector<int64_t>& lengths,
                           const AttentionShape& shape);

}  // namespace refinery::model
