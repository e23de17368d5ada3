// worker/task/quantize/grid.h
//
// The quantization grid and the column loop of GPTQ, on raw float32 buffers: no LibTorch here, so that this one file can be
// compiled for several instruction sets and chosen from at run time.
//
// Grids. A group of weights w becomes scale * (code - zero), code in 0 .. 2^bits - 1:
//   kFullRange   zero 2^(bits-1) and a signed scale. It starts at (signed extreme) / -zero, so that the extreme lands on code 0,
//                the longer side of the grid (AutoRound's "full range", the same as GGUF's Q4_0); mirrored scales are tried too.
//   kSymmetric   zero 2^(bits-1) and a positive scale that starts at 2 absmax / (2^bits - 1).
//   kAsymmetric  zero and scale so that [min(0, least), max(0, largest)] is covered; the neighbouring zero points are tried
//                too, each with the scale that covers the group again.
// Shrunken scales are tried, and the grid with the least weighted squared error is kept. Scales are rounded to float16 before
// they are judged, so the codes are exact for the stored scale, and they are never zero, infinite or NaN. In an all-zero group
// every code is the zero point.
// In the column loop the finalists are judged by what they really cost: the group's own columns are rounded one after the
// other with each, every column's error spread over the rest, and the sum of (w - q)^2 / U[i][i]^2 decides. That sum is exactly
// what the group adds to the objective when all later columns are free to make up for it (Frantar et al., equation 2).
//
// Layout: matrices are stored transposed, [columns, rows], so that one column of kLanes rows is two vectors; every row is
// independent of the others.
// Errors: none; inputs must be finite.  Threads: pure functions; callers split the rows.

#pragma once

#include <cstdint>

namespace refinery::quantize {

enum class Grid { kFullRange, kSymmetric, kAsymmetric };

struct GridRule {
  Grid grid = Grid::kFullRange;
  int64_t bits = 4;
  int64_t smallest_zero = 1;  // of kAsymmetric
};

inline constexpr int64_t kLanes = 32;     // rows that one call works on together
inline constexpr int64_t kMaxBlock = 128;  // columns between two lazy updates

// The value that float16 storage would give back, for finite |value|: nearest even, kept within +-[2^-24, 65504].
float RoundScaleToHalf(float value);

// One block of columns of one row tile. Columns are numbered in processing order.
struct ColumnBlock {
  int64_t rows = 0;               // of the whole matrix: the stride of all that follow
  GridRule rule;
  int64_t begin = 0, end = 0;     // columns of this block, at most kMaxBlock
  const int64_t* original = nullptr;      // [columns] processing order -> place in the matrix
  const int64_t* group_of = nullptr;      // [columns] processing order -> original group
  const int64_t* fit_columns = nullptr;   // [columns] > 0 where a group starts: its size; else 0
  const float* grid_weights = nullptr;    // [columns] what a squared error costs, or nullptr: all the same
  const float* factor = nullptr;          // U [columns, columns], upper, H^-1 = U^T U; nullptr = plain rounding
  int64_t factor_stride = 0;
  float* weight = nullptr;        // [columns, rows] in: updated by all earlier blocks; out: scale * (code - zero)
  float* errors = nullptr;        // [end - begin, rows] out: (w - q) / U[i][i]; unused without a factor
  uint8_t* codes = nullptr;       // [columns, rows] out, at the original place
  float* scales = nullptr;        // [groups, rows] out, at the original place; read where a group began in an earlier block
  float* zeros = nullptr;         // [groups, rows] the same
};

// Quantizes rows [first_row, first_row + kLanes) (fewer at the end of the matrix).
void QuantizeTile(const ColumnBlock& block, int64_t first_row);

}  // namespace refinery::quantize
