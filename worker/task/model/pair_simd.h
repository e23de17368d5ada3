// worker/task/model/pair_simd.h
//
// The instructions of AVX512_BF16 that the bfloat16 kernels share: a vector holds 32 bfloat16, two for each of 16 float sums.
// Only for files whose functions are marked RF_BF16_TARGET and run behind HasPairs().

#pragma once

#include "worker/task/model/bf16.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <initializer_list>

#define RF_BF16_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define RF_BF16_INLINE static inline __attribute__((always_inline)) RF_BF16_TARGET

namespace refinery::kernels {

using simd::Bf16;

inline bool HasPairs() {
  static const bool has = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has;
}

RF_BF16_INLINE __m512bh LoadPairs(const Bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
RF_BF16_INLINE __m512bh LoadPairs(const Bf16* p, __mmask32 mask) { return (__m512bh)_mm512_maskz_loadu_epi16(mask, p); }
// The two bfloat16 at p in all 16 places.
RF_BF16_INLINE __m512bh SplatPair(const Bf16* p) {
  int pair;
  __builtin_memcpy(&pair, p, sizeof(pair));
  return (__m512bh)_mm512_set1_epi32(pair);
}
RF_BF16_INLINE __m512 WidenHalves(const Bf16* p, __mmask16 mask) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16);
}

RF_BF16_INLINE void StoreHalves(Bf16* to, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}
RF_BF16_INLINE void StoreHalves(Bf16* to, __mmask16 mask, __m512 x) {
  _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

// e^x with a relative error below 3e-7; 0 below -87, infinity above 88.
RF_BF16_INLINE __m512 Exp(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  }
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  const __mmask16 seen = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
  return _mm512_maskz_scalef_ps(seen, p, n);
}

// Lane i of the result is the sum over the lanes of rows[i]: one order of additions, whatever else is computed.
RF_BF16_INLINE __m512 SumRows(const __m512* rows) {
  __m512 pairs[8], fours[4], eights[2];
  for (int i = 0; i < 8; ++i) {
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]), _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; ++i) {
    const __m512 a = fours[2 * i], b = fours[2 * i + 1];
    eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88), _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd));
}

}  // namespace refinery::kernels
#else
namespace refinery::kernels {
inline bool HasPairs() { return false; }
}  // namespace refinery::kernels
#endif
