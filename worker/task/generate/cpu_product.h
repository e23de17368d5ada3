// worker/task/generate/cpu_product.h
//
// y = x W^T for few rows of x, W as it lies in the model ([out, in], no repacking, no second copy). For one row it runs at the
// speed of memory; from a few rows on each weight that was read serves all of them.
//
// Dtypes: T is float or simd::Bf16; sums in float32. Bf16 takes the dot-product instructions of AVX512_BF16 where the CPU has
// them, else float arithmetic.  Threads: pure function; callers split the outputs.

#pragma once

#include <cstdint>

#include "worker/task/model/bf16.h"

namespace refinery::kernels {

template <typename T>
struct ProductArguments {
  const T* x;            // [rows, inputs]
  int64_t rows, inputs;
  const T* weight;       // [outputs, inputs]
  const T* bias;         // [outputs] or null
  float* y;              // row r, output n at y[r * y_stride + n]
  int64_t y_stride;
  bool accumulate;       // y += instead of y =
};

// Outputs [begin, end) of the product.
template <typename T>
void Product(const ProductArguments<T>& arguments, int64_t begin, int64_t end);

}  // namespace refinery::kernels
