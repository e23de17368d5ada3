// worker/task/model/simd.h
//
// Sixteen floats at a time in GCC's vector extension, for the hand-written CPU kernels: no torch, no intrinsics. A function
// marked RF_CPU_CLONES is compiled for AVX-512, AVX2 and the baseline, and the loader picks one at start. Include it
// only in files compiled with -Wno-psabi: all its functions are inlined, so the vector calling convention never matters.
//
// Dtypes: storage is float or Bf16 (a bfloat16's bits), arithmetic is float.  Errors: none.  Threads: pure functions.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "worker/task/model/bf16.h"

#define RF_INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define RF_CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RF_CPU_CLONES
#endif

namespace refinery::simd {

constexpr int64_t kLanes = 16;
using Floats = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));

RF_INLINE Floats Splat(float x) { return Floats{} + x; }

RF_INLINE Floats Load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
RF_INLINE Floats Load(const Bf16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof(h));
  return reinterpret_cast<Floats>(__builtin_convertvector(h, Words) << 16);
}
RF_INLINE void Store(float* p, Floats v) { std::memcpy(p, &v, sizeof(v)); }
// Rounds to nearest even; a NaN stays a NaN.
RF_INLINE void Store(Bf16* p, Floats v) {
  const Words bits = reinterpret_cast<Words>(v);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words quiet = (bits >> 16) | 0x40u;
  const Halves h = __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, Halves);
  std::memcpy(p, &h, sizeof(h));
}

RF_INLINE float ToFloat(float x) { return x; }
RF_INLINE float ToFloat(Bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
RF_INLINE void Assign(float* p, float x) { *p = x; }
RF_INLINE void Assign(Bf16* p, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  p->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

RF_INLINE float Sum(Floats v) {
  using Eight = float __attribute__((vector_size(32)));
  using Four = float __attribute__((vector_size(16)));
  Eight halves[2];
  std::memcpy(halves, &v, sizeof(v));
  const Eight eight = halves[0] + halves[1];
  Four quarters[2];
  std::memcpy(quarters, &eight, sizeof(eight));
  const Four four = quarters[0] + quarters[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// e^x with a relative error below 3e-7; the argument is clamped to [-87, 88], a NaN stays a NaN.
// Source: range reduction by multiples of ln 2 and the degree-6 polynomial of Cephes' expf.
RF_INLINE Floats Exp(Floats x) {
  x = x < -87.0f ? Splat(-87.0f) : x;
  x = x > 88.0f ? Splat(88.0f) : x;
  const Floats scaled = x * 1.44269504088896341f;
  const Ints n = __builtin_convertvector(scaled + (scaled < 0.0f ? Splat(-0.5f) : Splat(0.5f)), Ints);
  const Floats fn = __builtin_convertvector(n, Floats);
  const Floats r = (x - fn * 0.693359375f) - fn * -2.12194440e-4f;
  Floats p = Splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * reinterpret_cast<Floats>((n + 127) << 23);
}

RF_INLINE float ScalarExp(float x) { return Exp(Splat(x))[0]; }

}  // namespace refinery::simd
