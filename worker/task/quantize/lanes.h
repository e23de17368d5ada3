// worker/task/quantize/lanes.h
//
// Vectors for the kernels of GPTQ: kLanes rows of a matrix side by side, as two vectors of sixteen floats in GCC's vector
// extension, and the choice of an instruction set at run time. No LibTorch.
//
// A kernel is written once as an RF_INLINE body and defined for every instruction set by RF_KERNEL. Include this only in files
// that are compiled with -Wno-psabi: everything is inlined, so the vector calling convention never matters.
// Errors: none.  Threads: pure functions.

#pragma once

#include <cstdint>
#include <cstring>

#include "worker/task/quantize/grid.h"

#define RF_INLINE static inline __attribute__((always_inline))

// Defines void NAME(const TYPE&, int64_t) from the body NAME##Body, as the best of what this machine has.
#if defined(__x86_64__)
#define RF_KERNEL(NAME, TYPE)                                                                                                  \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) static void NAME##Avx512(const TYPE& t, int64_t row) { \
    NAME##Body(t, row);                                                                                                        \
  }                                                                                                                            \
  __attribute__((target("avx2,fma"))) static void NAME##Avx2(const TYPE& t, int64_t row) { NAME##Body(t, row); }               \
  static void NAME##Plain(const TYPE& t, int64_t row) { NAME##Body(t, row); }                                                  \
  void NAME(const TYPE& t, int64_t row) {                                                                                      \
    static const auto best = lanes::HasAvx512() ? NAME##Avx512 : lanes::HasAvx2() ? NAME##Avx2 : NAME##Plain;                  \
    best(t, row);                                                                                                              \
  }
#else
#define RF_KERNEL(NAME, TYPE) \
  void NAME(const TYPE& t, int64_t row) { NAME##Body(t, row); }
#endif

namespace refinery::quantize::lanes {

#if defined(__x86_64__)
inline bool HasAvx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
inline bool HasAvx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

using Vec = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
constexpr int64_t kWidth = 16;
constexpr int64_t kHalves = kLanes / kWidth;

// Adding and subtracting 1.5 * 2^23 rounds to the nearest even integer, for |x| < 2^22, in every instruction set.
constexpr float kRoundMagic = 12582912.0f;

RF_INLINE Vec Splat(float x) { return Vec{} + x; }
RF_INLINE Vec Load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
RF_INLINE void Store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
RF_INLINE Vec Max(Vec a, Vec b) { return a > b ? a : b; }
RF_INLINE Vec Min(Vec a, Vec b) { return a < b ? a : b; }
RF_INLINE Vec Abs(Vec a) { return reinterpret_cast<Vec>(reinterpret_cast<Ints>(a) & 0x7FFFFFFF); }

// Rounded to a whole number within [low, high]. Clamped first: the magic number only holds for small values.
RF_INLINE Vec RoundAndClamp(Vec x, Vec low, Vec high) { return (Min(Max(x, low), high) + kRoundMagic) - kRoundMagic; }

// What float16 storage gives back, kept within +-[2^-24, 65504] (grid.h, RoundScaleToHalf).
RF_INLINE Vec ToHalf(Vec value) {
  const Vec size = Abs(value);
  Ints bits = reinterpret_cast<Ints>(size);
  bits = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF;  // ten mantissa bits, ties to even
  const Vec subnormal = (size + 0.5f) - 0.5f;            // one unit in the last place of 0.5 is 2^-24
  Vec rounded = size < Splat(0x1p-14f) ? subnormal : reinterpret_cast<Vec>(bits);
  rounded = Min(Max(rounded, Splat(0x1p-24f)), Splat(65504.0f));
  return reinterpret_cast<Vec>(reinterpret_cast<Ints>(rounded) | (reinterpret_cast<Ints>(value) & INT32_MIN));
}

// `lanes` values of a row of a matrix into a full set, padded with zeros; and back.
RF_INLINE void CopyIn(const float* source, int64_t lanes, float* target) {
  for (int64_t r = 0; r < lanes; ++r) target[r] = source[r];
  for (int64_t r = lanes; r < kLanes; ++r) target[r] = 0.0f;
}
RF_INLINE void CopyOut(const float* source, int64_t lanes, float* target) {
  for (int64_t r = 0; r < lanes; ++r) target[r] = source[r];
}

}  // namespace refinery::quantize::lanes
