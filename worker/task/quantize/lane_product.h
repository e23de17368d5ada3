// worker/task/quantize/lane_product.h
//
// The products between the steps of GPTQ's column loop: A^T B for matrices that stand as the kernels of this folder hold them,
// transposed and kLanes rows at a time. Half of MKL's time for so few rows.
//
// Sums run along the depth in one order.  On raw float32 buffers, no LibTorch.  Errors: none.  Threads: pure functions.

#pragma once

#include <cstdint>

#include "worker/task/quantize/grid.h"

namespace refinery::quantize {

struct LaneProduct {
  const float* a = nullptr;  // [depth, width], `a_stride` floats apart
  int64_t a_stride = 0;
  const float* b = nullptr;  // [depth, rows]
  float* out = nullptr;      // [width, rows]: factor A^T B, added to what is there where `add` says so
  int64_t rows = 0, depth = 0, width = 0;
  float factor = 1;
  bool add = false;
};

// Rows [first_row, first_row + kLanes) (fewer at the end of the matrix).
void LaneProductTile(const LaneProduct& product, int64_t first_row);

// All rows.
inline void Multiply(const LaneProduct& product) {
  for (int64_t row = 0; row < product.rows; row += kLanes) LaneProductTile(product, row);
}

}  // namespace refinery::quantize
