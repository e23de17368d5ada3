// worker/task/model/kernels.h
//
// Memory-bound pieces of a transformer layer as plain loops over raw pointers, one pass each (no torch here; ops.h wraps them
// for autograd). Every function handles rows [0, rows): callers split rows over threads.
//
// T is float or simd::Bf16; arithmetic is float32, results are rounded once.  Threads: pure functions.

#pragma once

#include <cstdint>

#include "worker/task/model/bf16.h"

namespace refinery::kernels {

// y = x / rms(x) * weight over rows of `columns`; inverse_rms [rows] is written where given.
template <typename T>
void RmsNorm(const T* x, const T* weight, T* y, float* inverse_rms, int64_t rows, int64_t columns, float eps);

// dx of RmsNorm, given dy and the saved x and inverse_rms.
template <typename T>
void RmsNormBackward(const T* dy, const T* x, const T* weight, const float* inverse_rms, T* dx, int64_t rows, int64_t columns);

// Rotates `heads` heads of size d in each row: (a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of a head.
// cos and sin are rows of d floats; sign -1 gives the inverse (the backward pass). Rows of from and to have their strides.
struct RotateShape {
  int64_t rows, heads, head_dim, from_stride, to_stride;
};
template <typename T>
void Rotate(const T* from, T* to, const float* cos, const float* sin, float sign, const RotateShape& shape);

// out [rows, width] = silu(gate) * up, where each row of gate_up is gate [width] then up [width].
template <typename T>
void SiluMul(const T* gate_up, T* out, int64_t rows, int64_t width);

// d(gate_up) of SiluMul.
template <typename T>
void SiluMulBackward(const T* dout, const T* gate_up, T* dgate_up, int64_t rows, int64_t width);

}  // namespace refinery::kernels
