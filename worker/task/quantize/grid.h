// worker/task/quantize/grid.h
//
// The quantization grid and the column loop of GPTQ, on raw float32 buffers: no LibTorch here, so that this one file can be
// compiled for several instruction sets and chosen from at run time.
//
// Grid: symmetric and full range. A group of weights w becomes scale * (code - z), z = 2^(bits-1), code in 0 .. 2^bits - 1.
// The scale is signed: it starts at (signed extreme) / -z, so that the extreme lands on code 0, the longer side of the grid
// (AutoRound's "full range", the same as GGUF's Q4_0); shrunken and mirrored scales are tried too, and the one with the least
// weighted squared error is kept. Candidates are rounded to float16 before they are judged, so the codes are exact for the
// stored scale, and they are never zero, infinite or NaN.  An all-zero group has scale 1/z and codes z.
//
// Layout: matrices are stored transposed, [columns, rows], so that one column of kLanes rows is one or two vectors; every row
// is independent of the others.
// Errors: none; inputs must be finite.  Threads: pure functions; callers split the rows.

#pragma once

#include <cstdint>

namespace refinery::quantize {

inline constexpr int64_t kLanes = 32;     // rows that one call works on together
inline constexpr int64_t kMaxBlock = 128;  // columns between two lazy updates

// The value that float16 storage would give back, for finite |value|: nearest even, kept within +-[2^-24, 65504].
float RoundScaleToHalf(float value);

// Chooses one scale per lane for `columns` columns.
//   values   [columns, kLanes]
//   weights  [columns], >= 0: how much a squared error in that column costs; nullptr = all 1
//   scales   [kLanes] out
void FitScales(const float* values, int64_t columns, const float* weights, int64_t bits, float* scales);

// One block of columns of one row tile. Columns are numbered in processing order.
struct ColumnBlock {
  int64_t rows = 0;               // of the whole matrix: the stride of `weight`, `errors`, `codes` and `scales`
  int64_t bits = 4;
  int64_t begin = 0, end = 0;     // columns of this block, at most kMaxBlock
  const int64_t* original = nullptr;      // [columns] processing order -> place in the matrix
  const int64_t* group_of = nullptr;      // [columns] processing order -> original group
  const int64_t* fit_columns = nullptr;   // [columns] > 0 where a group starts: its size; else 0
  const float* grid_weights = nullptr;    // [columns] for FitScales, or nullptr
  const float* factor = nullptr;          // U [columns, columns], upper, H^-1 = U^T U; nullptr = plain rounding
  int64_t factor_stride = 0;
  const float* weight = nullptr;  // [columns, rows] updated by all earlier blocks
  float* errors = nullptr;        // [end - begin, rows] out: (w - q) / U[i][i]; unused without a factor
  uint8_t* codes = nullptr;       // [columns, rows] out, at the original place
  float* scales = nullptr;        // [groups, rows] out, at the original place; read where a group began in an earlier block
};

// Quantizes rows [first_row, first_row + kLanes) (fewer at the end of the matrix).
void QuantizeTile(const ColumnBlock& block, int64_t first_row);

}  // namespace refinery::quantize
