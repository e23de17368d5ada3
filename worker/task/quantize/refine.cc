#include "worker/task/quantize/refine.h"

#include <algorithm>

#include "worker/task/quantize/lanes.h"

namespace refinery::quantize {
namespace {

using namespace lanes;  // NOLINT(google-build-using-namespace): this file is written in them

// The block's columns of one row tile.
struct Tile {
  alignas(64) float gradient[kMaxBlock * kLanes];  // (H + damp) e
  alignas(64) float centred[kMaxBlock * kLanes];   // code - zero
  alignas(64) float change[kMaxBlock * kLanes];    // what the steps have taken from e
  alignas(64) float scale[kLanes], zero[kLanes];
  alignas(64) float product[kMaxBlock * kLanes];
};

// target[j] -= amount * row[j] for all columns of the block; `damp` stands on the diagonal, at column i.
RF_INLINE void Subtract(const RefineBlock& block, int64_t i, const Vec* amount, float* target) {
  const int64_t columns = block.end - block.begin;
  const float* row = block.hessian + (block.begin + i) * block.hessian_stride + block.begin;
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t h = 0; h < kHalves; ++h) {
      float* place = target + j * kLanes + h * kWidth;
      Store(place, Load(place) - amount[h] * row[j]);
    }
  }
  for (int64_t h = 0; h < kHalves; ++h) {
    float* place = target + i * kLanes + h * kWidth;
    Store(place, Load(place) - amount[h] * block.damp);
  }
}

RF_INLINE void LoadGrid(const RefineBlock& block, int64_t c, int64_t first_row, int64_t lanes, Tile& tile) {
  const int64_t place = block.group_of[c] * block.rows + first_row;
  CopyIn(block.scales + place, lanes, tile.scale);
  CopyIn(block.zeros + place, lanes, tile.zero);
  for (int64_t r = lanes; r < kLanes; ++r) tile.scale[r] = 1.0f;
}

// Each code of columns [first, last) of the block takes its best value given all others.
RF_INLINE void SweepCodes(const RefineBlock& block, int64_t first, int64_t last, Tile& tile) {
  const float top = static_cast<float>((int64_t{1} << block.bits) - 1);
  Vec scale[kHalves], inverse[kHalves], low[kHalves], high[kHalves];
  for (int64_t h = 0; h < kHalves; ++h) {
    scale[h] = Load(tile.scale + h * kWidth);
    inverse[h] = 1.0f / scale[h];
    low[h] = -Load(tile.zero + h * kWidth);
    high[h] = top + low[h];
  }
  for (int64_t i = first; i < last; ++i) {
    const float pivot = block.hessian[(block.begin + i) * (block.hessian_stride + 1)] + block.damp;
    if (!(pivot > 0.0f)) continue;
    const float inverse_pivot = 1.0f / pivot;
    Vec step[kHalves];
    bool moved = false;
    for (int64_t h = 0; h < kHalves; ++h) {
      const int64_t place = i * kLanes + h * kWidth;
      const Vec code = Load(tile.centred + place);
      const Vec wanted = RoundAndClamp(code + Load(tile.gradient + place) * inverse_pivot * inverse[h], low[h], high[h]);
      step[h] = (wanted - code) * scale[h];
      Store(tile.centred + place, wanted);
      Store(tile.change + place, Load(tile.change + place) + step[h]);
      const Ints differs = wanted != code;
      for (int64_t r = 0; r < kWidth; ++r) moved |= differs[r] != 0;
    }
    if (moved) Subtract(block, i, step, tile.gradient);
  }
}

// The scale of the group in columns [first, last) becomes the least-squares one.
RF_INLINE void FitScale(const RefineBlock& block, int64_t first, int64_t last, Tile& tile) {
  const int64_t columns = block.end - block.begin;
  Vec along[kHalves] = {}, curvature[kHalves] = {};
  std::fill(tile.product, tile.product + columns * kLanes, 0.0f);
  for (int64_t i = first; i < last; ++i) {
    Vec minus[kHalves];
    for (int64_t h = 0; h < kHalves; ++h) {
      const Vec code = Load(tile.centred + i * kLanes + h * kWidth);
      along[h] += code * Load(tile.gradient + i * kLanes + h * kWidth);
      minus[h] = -code;
    }
    Subtract(block, i, minus, tile.product);
  }
  for (int64_t i = first; i < last; ++i) {
    for (int64_t h = 0; h < kHalves; ++h) {
      curvature[h] += Load(tile.centred + i * kLanes + h * kWidth) * Load(tile.product + i * kLanes + h * kWidth);
    }
  }
  Vec step[kHalves];
  for (int64_t h = 0; h < kHalves; ++h) {
    const Vec scale = Load(tile.scale + h * kWidth);
    const Vec best = ToHalf(scale + along[h] / Max(curvature[h], Splat(1e-30f)));
    step[h] = best - scale;
    const Vec gain = step[h] * (2.0f * along[h] - step[h] * curvature[h]);
    const auto better = gain > 0.0f;  // rounding may have undone it; false for NaN too
    step[h] = better ? step[h] : Splat(0.0f);
    Store(tile.scale + h * kWidth, better ? best : scale);
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t h = 0; h < kHalves; ++h) {
      const int64_t place = j * kLanes + h * kWidth;
      Store(tile.gradient + place, Load(tile.gradient + place) - step[h] * Load(tile.product + place));
      if (j < first || j >= last) continue;
      Store(tile.change + place, Load(tile.change + place) + step[h] * Load(tile.centred + place));
    }
  }
}

RF_INLINE void LoadTile(const RefineBlock& block, int64_t first_row, int64_t lanes, Tile& tile) {
  for (int64_t i = 0; i < block.end - block.begin; ++i) {
    const int64_t c = block.begin + i;
    const uint8_t* codes = block.codes + block.original[c] * block.rows + first_row;
    const float* error = block.errors + c * block.rows + first_row;
    const float* zero = block.zeros + block.group_of[c] * block.rows + first_row;
    float* gradient = tile.gradient + i * kLanes;
    float* centred = tile.centred + i * kLanes;
    CopyIn(block.gradient + i * block.rows + first_row, lanes, gradient);
    std::fill(centred, centred + kLanes, 0.0f);
    for (int64_t r = 0; r < lanes; ++r) {
      gradient[r] += block.damp * error[r];
      centred[r] = static_cast<float>(codes[r]) - zero[r];
    }
  }
  std::fill(tile.change, tile.change + (block.end - block.begin) * kLanes, 0.0f);
}

RF_INLINE void StoreTile(const RefineBlock& block, int64_t first_row, int64_t lanes, const Tile& tile) {
  for (int64_t i = 0; i < block.end - block.begin; ++i) {
    const int64_t c = block.begin + i;
    uint8_t* codes = block.codes + block.original[c] * block.rows + first_row;
    float* error = block.errors + c * block.rows + first_row;
    const float* zero = block.zeros + block.group_of[c] * block.rows + first_row;
    for (int64_t r = 0; r < lanes; ++r) {
      codes[r] = static_cast<uint8_t>(static_cast<int32_t>(tile.centred[i * kLanes + r] + zero[r]));
      error[r] -= tile.change[i * kLanes + r];
    }
  }
}

RF_INLINE void RefineTileBody(const RefineBlock& block, int64_t first_row) {
  const int64_t lanes = std::min(kLanes, block.rows - first_row);
  const int64_t columns = block.end - block.begin;
  Tile tile;
  LoadTile(block, first_row, lanes, tile);
  for (int64_t sweep = 0; sweep < block.sweeps; ++sweep) {
    for (int64_t i = 0; i < columns;) {
      const int64_t c = block.begin + i;
      int64_t last = i + 1;
      while (last < columns && block.fit_columns[block.begin + last] == 0) ++last;
      LoadGrid(block, c, first_row, lanes, tile);
      SweepCodes(block, i, last, tile);
      if (block.fit_columns[c] == last - i) {
        FitScale(block, i, last, tile);
        CopyOut(tile.scale, lanes, block.scales + block.group_of[c] * block.rows + first_row);
      }
      i = last;
    }
  }
  StoreTile(block, first_row, lanes, tile);
}

}  // namespace

RF_KERNEL(RefineTile, RefineBlock)

}  // namespace refinery::quantize
