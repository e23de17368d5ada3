#include "worker/task/quantize/lane_product.h"

#include <algorithm>

#include "worker/task/quantize/lanes.h"

namespace refinery::quantize {
namespace {

using namespace lanes;  // NOLINT(google-build-using-namespace): this file is written in them

// Columns [column, column + N) of A.
template <int N>
RF_INLINE void MultiplyColumns(const LaneProduct& p, int64_t first_row, int64_t column) {
  Vec sums[N][kHalves] = {};
  const float* a = p.a + column;
  const float* b = p.b + first_row;
  for (int64_t k = 0; k < p.depth; ++k, a += p.a_stride, b += p.rows) {
    Vec values[kHalves];
    for (int64_t h = 0; h < kHalves; ++h) values[h] = Load(b + h * kWidth);
    for (int n = 0; n < N; ++n) {
      for (int64_t h = 0; h < kHalves; ++h) sums[n][h] += values[h] * a[n];
    }
  }
  for (int n = 0; n < N; ++n) {
    float* to = p.out + (column + n) * p.rows + first_row;
    for (int64_t h = 0; h < kHalves; ++h) {
      const Vec result = sums[n][h] * p.factor;
      Store(to + h * kWidth, p.add ? Load(to + h * kWidth) + result : result);
    }
  }
}

// Fewer rows than lanes.
RF_INLINE void MultiplyRest(const LaneProduct& p, int64_t first_row, int64_t lanes) {
  for (int64_t j = 0; j < p.width; ++j) {
    float sums[kLanes] = {};
    for (int64_t k = 0; k < p.depth; ++k) {
      const float a = p.a[k * p.a_stride + j];
      const float* b = p.b + k * p.rows + first_row;
      for (int64_t r = 0; r < lanes; ++r) sums[r] += a * b[r];
    }
    float* to = p.out + j * p.rows + first_row;
    for (int64_t r = 0; r < lanes; ++r) to[r] = (p.add ? to[r] : 0.0f) + p.factor * sums[r];
  }
}

RF_INLINE void LaneProductTileBody(const LaneProduct& p, int64_t first_row) {
  const int64_t lanes = std::min(kLanes, p.rows - first_row);
  if (lanes < kLanes) return MultiplyRest(p, first_row, lanes);
  int64_t column = 0;
  for (; column + 12 <= p.width; column += 12) MultiplyColumns<12>(p, first_row, column);  // 24 sums of AVX-512's 32 registers
  for (; column + 4 <= p.width; column += 4) MultiplyColumns<4>(p, first_row, column);
  for (; column < p.width; ++column) MultiplyColumns<1>(p, first_row, column);
}

}  // namespace

RF_KERNEL(LaneProductTile, LaneProduct)

}  // namespace refinery::quantize
