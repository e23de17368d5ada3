// worker/task/model/matmul.h
//
// x W^T and what follows it in a layer, without a gradient: by the kernels of pair_matmul.h for many rows of bfloat16 on the CPU,
// by ATen for everything else. The kernels round once, after the residual or the gate.
//
// Errors: c10::Error on shape bugs.  Threads: thread-safe.

#pragma once

#include <ATen/core/Tensor.h>

namespace refinery::model {

// Whether the kernels take the product: enough rows, bfloat16 on a CPU with the instructions, no gradient wanted.
bool TakesPairMatmul(const at::Tensor& x, const at::Tensor& weight);

// x [T, in], weight [out, in], bias [out] or undefined, residual [T, out] or undefined -> [T, out].
at::Tensor Matmul(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& residual = {});

// x W + residual, the product of gradients: x [T, in], weight [in, out], residual [T, out] or undefined -> [T, out].
at::Tensor MatmulByInputs(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& residual = {});

// silu(x gate^T) * (x up^T).  x [T, in], gate and up [out, in] -> [T, out]
at::Tensor GatedMatmul(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up);

}  // namespace refinery::model
