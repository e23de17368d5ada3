// worker/task/quantize/refine.h
//
// Lowers the objective e H e^T of a quantized matrix within its format, after GPTQ: coordinate descent over the codes (each takes
// the value that is best given all others) and over the scale of each group (the least-squares one given the codes, rounded to
// float16). Every step lowers the objective or changes nothing. Works block by block of columns: the caller brings H e for the
// block, made from the newest e of all columns. On raw float32 buffers, no LibTorch.
//
// Layout: as in grid.h, transposed and in processing order.  Errors: none.  Threads: pure functions; callers split the rows.

#pragma once

#include <cstdint>

#include "worker/task/quantize/grid.h"

namespace refinery::quantize {

struct RefineBlock {
  int64_t rows = 0;               // of the whole matrix: the stride of all that follow
  int64_t bits = 4;
  int64_t begin = 0, end = 0;     // columns of this block, at most kMaxBlock
  int64_t sweeps = 2;             // over the codes of the block, each with the scales after it
  const int64_t* original = nullptr;      // as in ColumnBlock
  const int64_t* group_of = nullptr;
  const int64_t* fit_columns = nullptr;   // groups that do not lie in the block as a whole keep their scales
  const float* hessian = nullptr;         // H [columns, columns] without damping
  int64_t hessian_stride = 0;
  float damp = 0;                 // added to its diagonal
  const float* gradient = nullptr;        // [end - begin, rows] (H e) without damping
  float* errors = nullptr;        // [columns, rows] e = wanted - scale * (code - zero), updated
  uint8_t* codes = nullptr;       // [columns, rows] at the original place, updated
  float* scales = nullptr;        // [groups, rows] at the original place, updated
  const float* zeros = nullptr;   // [groups, rows] at the original place
};

// Rows [first_row, first_row + kLanes) (fewer at the end of the matrix).
void RefineTile(const RefineBlock& block, int64_t first_row);

}  // namespace refinery::quantize
