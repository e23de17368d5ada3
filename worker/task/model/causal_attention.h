// worker/task/model/causal_attention.h
//
// Rotary embedding and causal attention of whole sequences by the kernels of pair_attention.h, and its gradient: PackedAttention
// (ops.h) in bfloat16. LibTorch's flash attention takes its products through float32 on CPUs without AMX.
//
// A sequence's result is the same to the last bit whatever shares the call and however many threads there are.
// Errors: c10::Error on shape bugs (checked by PackedAttention).  Threads: thread-safe.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "worker/task/model/ops.h"

namespace refinery::model {

// bfloat16 on a CPU with AVX512_BF16; where a gradient is wanted, only while the weights of all queries fit into 128 MiB.
bool TakesCausalAttention(const at::Tensor& qkv, const std::vector<int64_t>& lengths, const AttentionShape& shape);

// As PackedAttention. cos and sin contiguous.
at::Tensor CausalAttention(const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin, const std::vector<int64_t>& lengths,
                           const AttentionShape& shape);

// The gradient of the same from that of its result: dout, out [T, n d], contiguous -> [T, (n + 2 m) d].
at::Tensor CausalAttentionGradient(const at::Tensor& dout, const at::Tensor& out, const at::Tensor& qkv, const at::Tensor& cos,
                                   const at::Tensor& sin, const std::vector<int64_t>& lengths, const AttentionShape& shape);

}  // namespace refinery::model
