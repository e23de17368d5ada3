// worker/task/generate/packed_product.h
//
// y = x W^T for few rows of x, W packed as model/packed_weight.h says: codes become bfloat16 integers in registers (exact),
// products and sums are float32, each group's sum is multiplied by its scale once. No expanded copy of the weight.
//
// One order of additions per (row, output), whatever else is in the batch.  Threads: pure function; callers split the outputs.

#pragma once

#include <cstdint>

#include "worker/task/model/bf16.h"

namespace refinery::kernels {

struct PackedMatrix {
  const uint8_t* codes;    // [outputs, chunks * planes * 32]
  const uint16_t* scales;  // [outputs, groups] float16
  const float* offsets;    // [outputs, groups] or null
  int64_t inputs, group_size;
  int planes, bits;
};

struct PackedArguments {
  const simd::Bf16* x;     // [rows, inputs]
  int64_t rows;
  PackedMatrix weight;
  const simd::Bf16* bias;  // [outputs] or null
  float* y;                // row r, output n at y[r * y_stride + n]
  int64_t y_stride;
  bool accumulate;         // y += instead of y =
};

// Outputs [begin, end) of the product.
void PackedProduct(const PackedArguments& arguments, int64_t begin, int64_t end);

}  // namespace refinery::kernels
