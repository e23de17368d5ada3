#include "worker/task/quantize/grid.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "worker/task/quantize/lanes.h"

namespace refinery::quantize {
namespace {

using namespace lanes;  // NOLINT(google-build-using-namespace): this file is written in them

constexpr int kShrinks = 17;    // scales tried for one zero point
constexpr int kFinalists = 7;   // of those judged by the real cost, with the best one itself

// Scale and zero point of kLanes groups, one in each row.
struct Grids {
  Vec scale[kHalves], zero[kHalves];
};

// The smallest multiple of the covering scale that is worth a try: the fewer the codes, the more clipping pays.
RF_INLINE float SmallestShrink(int64_t bits) { return bits <= 2 ? 0.4f : bits == 3 ? 0.5f : bits == 4 ? 0.6f : 0.9f; }

// Adds the weighted squared errors of rounding `columns` columns to the grids. `step` is 0 where one weight stands for all.
RF_INLINE void AddErrors(const float* values, int64_t columns, const float* weights, int64_t step, float top, const Grids& grids,
                         Vec* error) {
  Vec inverse[kHalves], low[kHalves], high[kHalves];
  for (int64_t h = 0; h < kHalves; ++h) {
    inverse[h] = 1.0f / grids.scale[h];
    low[h] = -grids.zero[h];
    high[h] = top - grids.zero[h];
    error[h] = Splat(0.0f);
  }
  for (int64_t c = 0; c < columns; ++c) {
    const float cost = weights[c * step];
    for (int64_t h = 0; h < kHalves; ++h) {
      const Vec w = Load(values + c * kLanes + h * kWidth);
      const Vec d = w - grids.scale[h] * RoundAndClamp(w * inverse[h], low[h], high[h]);
      error[h] += cost * (d * d);
    }
  }
}

RF_INLINE void KeepBetter(const Grids& tried, const Vec* error, Grids* best, Vec* best_error) {
  for (int64_t h = 0; h < kHalves; ++h) {
    const auto better = error[h] < best_error[h];
    best->scale[h] = better ? tried.scale[h] : best->scale[h];
    best->zero[h] = better ? tried.zero[h] : best->zero[h];
    best_error[h] = better ? error[h] : best_error[h];
  }
}

// The unshrunken grids to start from; returns how many of the three there are.
RF_INLINE int StartingGrids(const float* values, int64_t columns, const GridRule& rule, Grids* starts) {
  const float top = static_cast<float>((int64_t{1} << rule.bits) - 1);
  const float middle = static_cast<float>(int64_t{1} << (rule.bits - 1));
  const float floor_zero = static_cast<float>(rule.smallest_zero);
  for (int64_t h = 0; h < kHalves; ++h) {
    Vec least = Splat(0.0f), largest = Splat(0.0f);
    for (int64_t c = 0; c < columns; ++c) {
      const Vec w = Load(values + c * kLanes + h * kWidth);
      least = Min(least, w);
      largest = Max(largest, w);
    }
    const auto empty = (largest - least) == 0.0f;
    if (rule.grid == Grid::kFullRange) {
      const Vec extreme = largest >= -least ? largest : least;
      // Mirrored, the extreme lies on the shorter side and needs a longer step to be reached.
      starts[0].scale[h] = empty ? Splat(1.0f / middle) : extreme / -middle;
      starts[1].scale[h] = empty ? Splat(1.0f / middle) : extreme / (middle - 1.0f);
      starts[0].zero[h] = starts[1].zero[h] = Splat(middle);
    } else if (rule.grid == Grid::kSymmetric) {
      starts[0].scale[h] = empty ? Splat(1.0f / middle) : Max(largest, -least) * 2.0f / top;
      starts[0].zero[h] = Splat(middle);
    } else {
      const Vec nearest = RoundAndClamp(-least * top / (empty ? Splat(1.0f) : largest - least), Splat(0.0f), Splat(top));
      for (int i = 0; i < 3; ++i) {
        const Vec zero = Min(Max(nearest + static_cast<float>(i == 2 ? -1 : i), Splat(floor_zero)), Splat(top));
        const Vec above = zero < top ? largest / Max(top - zero, Splat(1.0f)) : Splat(0.0f);
        const Vec below = zero > 0.0f ? -least / Max(zero, Splat(1.0f)) : Splat(0.0f);
        const Vec covering = Max(above, below);
        // With all weights on one side and the zero point at that end nothing can be covered: any scale, every code the zero.
        starts[i].scale[h] = covering > 0.0f ? covering : empty ? Splat(1.0f / top) : (largest - least) / top;
        starts[i].zero[h] = zero;
      }
    }
  }
  return rule.grid == Grid::kFullRange ? 2 : rule.grid == Grid::kSymmetric ? 1 : 3;
}

// The best grids by the weighted squared error alone, over all starting grids.
RF_INLINE void FitGrids(const float* values, int64_t columns, const float* weights, const GridRule& rule, Grids* best) {
  static constexpr float kOne = 1.0f;
  const float top = static_cast<float>((int64_t{1} << rule.bits) - 1);
  Grids starts[3] = {};
  const int count = StartingGrids(values, columns, rule, starts);
  Vec best_error[kHalves];
  for (int64_t h = 0; h < kHalves; ++h) {
    best_error[h] = Splat(INFINITY);
    best->scale[h] = ToHalf(starts[0].scale[h]);  // stays where squared errors overflow
    best->zero[h] = starts[0].zero[h];
  }
  const float shrink_step = (1.0f - SmallestShrink(rule.bits)) / (kShrinks - 1);
  for (int i = 0; i < count; ++i) {
    for (int k = 0; k < kShrinks; ++k) {
      Grids tried;
      Vec error[kHalves];
      for (int64_t h = 0; h < kHalves; ++h) {
        tried.scale[h] = ToHalf(starts[i].scale[h] * (1.0f - shrink_step * static_cast<float>(k)));
        tried.zero[h] = starts[i].zero[h];
      }
      AddErrors(values, columns, weights == nullptr ? &kOne : weights, weights == nullptr ? 0 : 1, top, tried, error);
      KeepBetter(tried, error, best, best_error);
    }
  }
}

// What the columns of one whole group cost in the column loop with these grids. `scratch` has room for them.
RF_INLINE void LoopCost(const float* values, int64_t columns, const float* factor, int64_t stride, float top, const Grids& grids,
                        float* scratch, Vec* cost) {
  std::copy(values, values + columns * kLanes, scratch);
  Vec inverse[kHalves], low[kHalves], high[kHalves];
  for (int64_t h = 0; h < kHalves; ++h) {
    inverse[h] = 1.0f / grids.scale[h];
    low[h] = -grids.zero[h];
    high[h] = top - grids.zero[h];
    cost[h] = Splat(0.0f);
  }
  for (int64_t i = 0; i < columns; ++i) {
    const float* row = factor + i * stride;
    const float inverse_pivot = 1.0f / row[i];
    Vec error[kHalves];
    for (int64_t h = 0; h < kHalves; ++h) {
      const Vec w = Load(scratch + i * kLanes + h * kWidth);
      error[h] = (w - grids.scale[h] * RoundAndClamp(w * inverse[h], low[h], high[h])) * inverse_pivot;
      cost[h] += error[h] * error[h];
    }
    for (int64_t j = i + 1; j < columns; ++j) {
      float* later = scratch + j * kLanes;
      for (int64_t h = 0; h < kHalves; ++h) Store(later + h * kWidth, Load(later + h * kWidth) - error[h] * row[j]);
    }
  }
}

// Replaces the grids by that of their neighbours that costs the least in the column loop.
RF_INLINE void ChooseFinalist(const float* values, int64_t columns, const float* factor, int64_t stride, const GridRule& rule,
                              Grids* grids) {
  alignas(64) float scratch[kMaxBlock * kLanes];
  const float top = static_cast<float>((int64_t{1} << rule.bits) - 1);
  const float spread = (1.0f - SmallestShrink(rule.bits)) * 0.12f;
  const Grids center = *grids;
  Vec best_cost[kHalves];
  for (int64_t h = 0; h < kHalves; ++h) best_cost[h] = Splat(INFINITY);
  for (int k = 0; k < kFinalists; ++k) {
    Grids tried = center;
    Vec cost[kHalves];
    const float multiple = 1.0f + spread * static_cast<float>(k % 2 == 0 ? k / 2 : -(k + 1) / 2);
    for (int64_t h = 0; h < kHalves; ++h) tried.scale[h] = ToHalf(center.scale[h] * multiple);
    LoopCost(values, columns, factor, stride, top, tried, scratch, cost);
    KeepBetter(tried, cost, grids, best_cost);
  }
}

// The grids of the group that starts at column c; from the error-updated tile, or from the whole matrix when the group is
// longer than the block (then it starts the block, so every earlier column's error has already been spread).
RF_INLINE void FitGroup(const ColumnBlock& block, const float* tile, int64_t c, int64_t first_row, int64_t lanes, Grids* grids) {
  const int64_t columns = block.fit_columns[c];
  const float* cost = block.grid_weights == nullptr ? nullptr : block.grid_weights + c;
  if (c + columns <= block.end) {
    const float* values = tile + (c - block.begin) * kLanes;
    FitGrids(values, columns, cost, block.rule, grids);
    if (block.factor != nullptr) {
      ChooseFinalist(values, columns, block.factor + c * block.factor_stride + c, block.factor_stride, block.rule, grids);
    }
  } else {
    std::vector<float> whole(static_cast<size_t>(columns * kLanes));
    for (int64_t i = 0; i < columns; ++i) CopyIn(block.weight + (c + i) * block.rows + first_row, lanes, whole.data() + i * kLanes);
    FitGrids(whole.data(), columns, cost, block.rule, grids);
  }
  alignas(64) float scale[kLanes], zero[kLanes];
  for (int64_t h = 0; h < kHalves; ++h) {
    Store(scale + h * kWidth, grids->scale[h]);
    Store(zero + h * kWidth, grids->zero[h]);
  }
  CopyOut(scale, lanes, block.scales + block.group_of[c] * block.rows + first_row);
  CopyOut(zero, lanes, block.zeros + block.group_of[c] * block.rows + first_row);
}

// The grids of a group that began in an earlier block.
RF_INLINE void LoadGrids(const ColumnBlock& block, int64_t first_row, int64_t lanes, Grids* grids) {
  alignas(64) float scale[kLanes], zero[kLanes];
  const int64_t place = block.group_of[block.begin] * block.rows + first_row;
  CopyIn(block.scales + place, lanes, scale);
  CopyIn(block.zeros + place, lanes, zero);
  for (int64_t r = lanes; r < kLanes; ++r) scale[r] = 1.0f;
  for (int64_t h = 0; h < kHalves; ++h) {
    grids->scale[h] = Load(scale + h * kWidth);
    grids->zero[h] = Load(zero + h * kWidth);
  }
}

RF_INLINE void QuantizeTileBody(const ColumnBlock& block, int64_t first_row) {
  const int64_t lanes = std::min(kLanes, block.rows - first_row);
  const int64_t columns = block.end - block.begin;
  const float top = static_cast<float>((int64_t{1} << block.rule.bits) - 1);
  alignas(64) float tile[kMaxBlock * kLanes], errors[kLanes], codes[kLanes], values[kLanes];
  for (int64_t i = 0; i < columns; ++i) CopyIn(block.weight + (block.begin + i) * block.rows + first_row, lanes, tile + i * kLanes);
  Grids grids = {};
  if (block.fit_columns[block.begin] == 0) LoadGrids(block, first_row, lanes, &grids);
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t c = block.begin + i;
    if (block.fit_columns[c] > 0) FitGroup(block, tile, c, first_row, lanes, &grids);
    const float* factor = block.factor == nullptr ? nullptr : block.factor + c * block.factor_stride + block.begin;
    const float inverse_pivot = factor == nullptr ? 0.0f : 1.0f / factor[i];
    Vec error[kHalves];
    for (int64_t h = 0; h < kHalves; ++h) {
      const Vec w = Load(tile + i * kLanes + h * kWidth);
      const Vec centred = RoundAndClamp(w / grids.scale[h], -grids.zero[h], top - grids.zero[h]);
      error[h] = (w - grids.scale[h] * centred) * inverse_pivot;
      Store(codes + h * kWidth, centred + grids.zero[h]);
      Store(values + h * kWidth, grids.scale[h] * centred);
      Store(errors + h * kWidth, error[h]);
    }
    uint8_t* stored = block.codes + block.original[c] * block.rows + first_row;
    for (int64_t r = 0; r < lanes; ++r) stored[r] = static_cast<uint8_t>(static_cast<int32_t>(codes[r]));
    CopyOut(values, lanes, block.weight + c * block.rows + first_row);
    if (factor == nullptr) continue;
    for (int64_t j = i + 1; j < columns; ++j) {
      float* later = tile + j * kLanes;
      for (int64_t h = 0; h < kHalves; ++h) Store(later + h * kWidth, Load(later + h * kWidth) - error[h] * factor[j]);
    }
    CopyOut(errors, lanes, block.errors + i * block.rows + first_row);
  }
}

}  // namespace

float RoundScaleToHalf(float value) { return ToHalf(Splat(value))[0]; }

RF_KERNEL(QuantizeTile, ColumnBlock)

}  // namespace refinery::quantize
