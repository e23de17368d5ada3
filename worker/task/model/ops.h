// worker/task/model/ops.h
//
// The fused pieces of a layer, differentiable in their activations (weights are frozen): float32 and bfloat16 tensors on the
// CPU take the kernels of kernels.h, everything else (CUDA, float64) the same formulas in ATen. The branch is made here only.
//
// Errors: c10::Error on shape bugs.  Threads: thread-safe.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace refinery::model {

// True where the CPU kernels take tensors like x: CPU and float32 or bfloat16.
bool TakesCpuKernels(const at::Tensor& x);

// x / rms(x) * weight over the last dimension.  x [..., H], weight [H] -> [..., H], computed in float32.
at::Tensor RmsNorm(const at::Tensor& x, const at::Tensor& weight, double eps);

// silu(gate) * up.  gate_up [T, 2I], a row being gate then up -> [T, I]
at::Tensor SiluMul(const at::Tensor& gate_up);

struct AttentionShape {
  int64_t heads = 0, kv_heads = 0, head_dim = 0;
  int64_t sliding_window = 0;  // 0 = none
};

// Rotary embedding and causal attention of sequences laid end to end; a row of qkv is q [n*d], k [m*d], v [m*d].
//   qkv [T, (n+2m)*d], cos and sin [T, d] float32, lengths sum to T  ->  [T, n*d]
at::Tensor PackedAttention(const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin,
                           const std::vector<int64_t>& lengths, const AttentionShape& shape);

// x with the rotary embedding applied per head.  x [T, h*d] -> [T, h*d]; not differentiable on the CPU path.
at::Tensor Rotated(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t head_dim);

}  // namespace refinery::model
