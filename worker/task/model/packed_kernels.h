// worker/task/model/packed_kernels.h
//
// Packed weights (packed_weight.h) back to numbers, on raw pointers without torch: weight = scale * (code + add), computed in
// float32 and rounded once to T (float or simd::Bf16).  Threads: pure function on the rows it is given.

#pragma once

#include <cstdint>

#include "worker/task/model/bf16.h"

namespace refinery::kernels {

struct PackedRows {
  const uint8_t* codes;    // [rows, ceil(inputs / 64) * planes * 32]
  const float* scales;     // [rows, groups]
  const float* adds;       // [rows, groups] = offset - 2^(bits-1)
  int64_t inputs, group_size;
  int planes;
};

// Rows [begin, end) to out [rows, inputs].
template <typename T>
void ExpandRows(const PackedRows& packed, T* out, int64_t begin, int64_t end);

}  // namespace refinery::kernels
