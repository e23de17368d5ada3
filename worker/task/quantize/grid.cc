#include "worker/task/quantize/grid.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#define RF_INLINE inline __attribute__((always_inline))

namespace refinery::quantize {
namespace {

// Adding and subtracting 1.5 * 2^23 rounds to the nearest even integer, for |x| < 2^22, in every instruction set.
constexpr float kRoundMagic = 12582912.0f;
constexpr float kSmallestHalf = 0x1p-24f;
constexpr float kLargestHalf = 65504.0f;

RF_INLINE float HalfOf(float value) {
  const float size = std::fabs(value);
  uint32_t bits;
  std::memcpy(&bits, &size, sizeof bits);
  bits = (bits + 0xFFFu + ((bits >> 13) & 1u)) & ~0x1FFFu;  // ten mantissa bits, ties to even
  float normal;
  std::memcpy(&normal, &bits, sizeof normal);
  const float subnormal = (size + 0.5f) - 0.5f;  // one unit in the last place of 0.5 is 2^-24
  float rounded = size < 0x1p-14f ? subnormal : normal;
  rounded = rounded < kSmallestHalf ? kSmallestHalf : rounded;
  rounded = rounded > kLargestHalf ? kLargestHalf : rounded;
  return std::copysign(rounded, value);
}

// code - z for the value w / scale.
RF_INLINE float RoundAndClamp(float quotient, float low, float high) {
  quotient = quotient < low ? low : quotient;  // before rounding: the magic number only holds for small values
  quotient = quotient > high ? high : quotient;
  return (quotient + kRoundMagic) - kRoundMagic;
}

// Multiples of extreme / -z that are tried; negative ones put the extreme on the shorter side of the grid.
constexpr float kShrinks[] = {1.0f,  0.975f, 0.95f, 0.925f, 0.9f,  0.875f, 0.85f, 0.825f, 0.8f,  0.775f, 0.75f, 0.725f,
                              0.7f,  0.65f,  0.6f,  0.55f,  0.5f};

RF_INLINE void FitScalesBody(const float* values, int64_t columns, const float* weights, int64_t bits, float* scales) {
  const float zero = static_cast<float>(int64_t{1} << (bits - 1));
  alignas(64) float extreme[kLanes] = {}, best_error[kLanes], best[kLanes];
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < kLanes; ++r) {
      const float w = values[c * kLanes + r];
      extreme[r] = std::fabs(w) > std::fabs(extreme[r]) ? w : extreme[r];
    }
  }
  bool first = true;
  // Mirrored, the extreme needs a longer step to be reached: z / (z - 1) of the plain one.
  const float mirror = zero > 1.5f ? -zero / (zero - 1.0f) : -1.0f;
  for (const float sign : {1.0f, mirror}) {
    for (const float shrink : kShrinks) {
      alignas(64) float scale[kLanes], inverse[kLanes], error[kLanes] = {};
      for (int64_t r = 0; r < kLanes; ++r) {
        const float wanted = extreme[r] == 0.0f ? 1.0f / zero : -extreme[r] / zero * (sign * shrink);
        scale[r] = HalfOf(wanted);
        inverse[r] = 1.0f / scale[r];
      }
      for (int64_t c = 0; c < columns; ++c) {
        const float cost = weights == nullptr ? 1.0f : weights[c];
        for (int64_t r = 0; r < kLanes; ++r) {
          const float w = values[c * kLanes + r];
          const float d = w - scale[r] * RoundAndClamp(w * inverse[r], -zero, zero - 1.0f);
          error[r] += cost * (d * d);
        }
      }
      for (int64_t r = 0; r < kLanes; ++r) {
        const bool better = first || error[r] < best_error[r];
        best[r] = better ? scale[r] : best[r];
        best_error[r] = better ? error[r] : best_error[r];
      }
      first = false;
    }
  }
  for (int64_t r = 0; r < kLanes; ++r) scales[r] = best[r];
}

// Copies columns [begin, end) of `lanes` rows, padding with zero rows.
RF_INLINE void CopyTile(const ColumnBlock& block, int64_t begin, int64_t end, int64_t first_row, int64_t lanes, float* tile) {
  for (int64_t c = begin; c < end; ++c) {
    const float* source = block.weight + c * block.rows + first_row;
    float* target = tile + (c - begin) * kLanes;
    for (int64_t r = 0; r < lanes; ++r) target[r] = source[r];
    for (int64_t r = lanes; r < kLanes; ++r) target[r] = 0.0f;
  }
}

// The scales of the group that starts at column c; from the error-updated tile, or from the whole matrix when the group is
// longer than the block (then it starts the block, so every earlier column's error has already been spread).
RF_INLINE void FitGroup(const ColumnBlock& block, const float* tile, int64_t c, int64_t first_row, int64_t lanes,
                        float* scales) {
  const int64_t columns = block.fit_columns[c];
  const float* cost = block.grid_weights == nullptr ? nullptr : block.grid_weights + c;
  if (c + columns <= block.end) {
    FitScalesBody(tile + (c - block.begin) * kLanes, columns, cost, block.bits, scales);
  } else {
    std::vector<float> whole(static_cast<size_t>(columns * kLanes));
    CopyTile(block, c, c + columns, first_row, lanes, whole.data());
    FitScalesBody(whole.data(), columns, cost, block.bits, scales);
  }
  float* stored = block.scales + block.group_of[c] * block.rows + first_row;
  for (int64_t r = 0; r < lanes; ++r) stored[r] = scales[r];
}

RF_INLINE void QuantizeTileBody(const ColumnBlock& block, int64_t first_row) {
  const int64_t lanes = std::min(kLanes, block.rows - first_row);
  const int64_t columns = block.end - block.begin;
  const float zero = static_cast<float>(int64_t{1} << (block.bits - 1));
  alignas(64) float tile[kMaxBlock * kLanes];
  alignas(64) float scales[kLanes], error[kLanes], code[kLanes];
  CopyTile(block, block.begin, block.end, first_row, lanes, tile);
  for (int64_t r = 0; r < kLanes; ++r) scales[r] = 1.0f;
  if (block.fit_columns[block.begin] == 0) {
    const float* stored = block.scales + block.group_of[block.begin] * block.rows + first_row;
    for (int64_t r = 0; r < lanes; ++r) scales[r] = stored[r];
  }
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t c = block.begin + i;
    if (block.fit_columns[c] > 0) FitGroup(block, tile, c, first_row, lanes, scales);
    const float* w = tile + i * kLanes;
    for (int64_t r = 0; r < kLanes; ++r) code[r] = RoundAndClamp(w[r] / scales[r], -zero, zero - 1.0f);
    uint8_t* codes = block.codes + block.original[c] * block.rows + first_row;
    for (int64_t r = 0; r < lanes; ++r) codes[r] = static_cast<uint8_t>(static_cast<int32_t>(code[r] + zero));
    if (block.factor == nullptr) continue;
    const float* factor = block.factor + c * block.factor_stride + block.begin;
    const float inverse_pivot = 1.0f / factor[i];
    for (int64_t r = 0; r < kLanes; ++r) error[r] = (w[r] - scales[r] * code[r]) * inverse_pivot;
    for (int64_t j = i + 1; j < columns; ++j) {
      float* later = tile + j * kLanes;
      const float u = factor[j];
      for (int64_t r = 0; r < kLanes; ++r) later[r] -= error[r] * u;
    }
    float* errors = block.errors + i * block.rows + first_row;
    for (int64_t r = 0; r < lanes; ++r) errors[r] = error[r];
  }
}

#if defined(__x86_64__)
#define RF_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define RF_AVX2 __attribute__((target("avx2,fma")))
RF_AVX512 void QuantizeTileAvx512(const ColumnBlock& block, int64_t row) { QuantizeTileBody(block, row); }
RF_AVX2 void QuantizeTileAvx2(const ColumnBlock& block, int64_t row) { QuantizeTileBody(block, row); }
enum class Level { kPlain, kAvx2, kAvx512 };
Level BestLevel() {
  static const Level level = [] {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      return Level::kAvx512;
    }
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Level::kAvx2 : Level::kPlain;
  }();
  return level;
}
#endif

}  // namespace

float RoundScaleToHalf(float value) { return HalfOf(value); }

void FitScales(const float* values, int64_t columns, const float* weights, int64_t bits, float* scales) {
  FitScalesBody(values, columns, weights, bits, scales);
}

void QuantizeTile(const ColumnBlock& block, int64_t first_row) {
#if defined(__x86_64__)
  switch (BestLevel()) {
    case Level::kAvx512: return QuantizeTileAvx512(block, first_row);
    case Level::kAvx2: return QuantizeTileAvx2(block, first_row);
    case Level::kPlain: break;
  }
#endif
  QuantizeTileBody(block, first_row);
}

}  // namespace refinery::quantize
