// worker/task/model/pair_tile.h
//
// The tile of the bfloat16 products: rows of pairs times a panel, for pair_matmul.cc and pair_gram.cc.
//
//   rows   x [rows, inputs] bfloat16, `stride` numbers apart
//   panel  [inputs / 2, 64, 2] bfloat16, aligned to 64 bytes: for each pair of inputs, that of 64 outputs
//
// Only for files whose functions are marked RF_BF16_TARGET and run behind HasPairs().

#pragma once

#include <algorithm>
#include <cstdint>

#include "worker/task/model/pair_matmul.h"
#include "worker/task/model/pair_simd.h"

#if defined(__x86_64__)
namespace refinery::kernels {

constexpr int kVectors = 4;   // of a panel: 64 outputs
constexpr int kTileRows = 6;  // 6 x 4 sums, 4 weights and an input fill the 32 registers

// rows[i] lane j becomes rows[j] lane i.
RF_BF16_INLINE void Transpose(__m512i* rows) {
  __m512i a[16], b[16];
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) {
      b[4 * i + 2 * j] = _mm512_unpacklo_epi64(a[4 * i + j], a[4 * i + 2 + j]);
      b[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(a[4 * i + j], a[4 * i + 2 + j]);
    }
  }
  // b[4 i + c]: column c of each 128-bit lane, rows 4 i .. 4 i + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), high01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd);
    const __m512i low23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88), high23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    rows[8 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    rows[4 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    rows[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
}

constexpr int64_t kAheadBytes = 512;  // of the panel, which streams from the second-level cache

// One pair of inputs.
template <int R>
RF_BF16_INLINE void MultiplyPair(const Bf16* x, int64_t stride, const uint32_t* panel, __m512 (&sums)[R][kVectors]) {
  __m512bh weights[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    weights[v] = (__m512bh)_mm512_load_si512(panel + v * 16);
    _mm_prefetch(reinterpret_cast<const char*>(panel + v * 16) + kAheadBytes, _MM_HINT_T0);
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    const __m512bh input = SplatPair(x + r * stride);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], input, weights[v]);
  }
}

template <int R>
RF_BF16_INLINE void Multiply(const Bf16* x, int64_t stride, const uint32_t* panel, int64_t inputs, __m512 (&sums)[R][kVectors]) {
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_setzero_ps();
  }
  int64_t c = 0;
  for (; c + 32 <= inputs; c += 32, panel += 16 * kPanelOutputs) {
    // The rows of the next tile, a cache line each; past the last one a prefetch does no harm.
    for (int r = 0; r < R; ++r) _mm_prefetch(reinterpret_cast<const char*>(x + (R + r) * stride + c), _MM_HINT_T0);
    for (int i = 0; i < 16; ++i) MultiplyPair<R>(x + c + 2 * i, stride, panel + i * kPanelOutputs, sums);
  }
  for (; c < inputs; c += 2, panel += kPanelOutputs) MultiplyPair<R>(x + c, stride, panel, sums);
}

RF_BF16_INLINE __mmask16 LanesBelow(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
}

// Calls Body<R>(..., row, ...) for all rows of [begin, end), at most kTileRows at once.
#define RF_FOR_ROWS(Body, begin, end, ...)                       \
  for (int64_t row = begin; row < end;) {                        \
    const int64_t left = end - row;                              \
    switch (left >= kTileRows ? kTileRows : left) {              \
      case 1: Body<1>(__VA_ARGS__); break;                       \
      case 2: Body<2>(__VA_ARGS__); break;                       \
      case 3: Body<3>(__VA_ARGS__); break;                       \
      case 4: Body<4>(__VA_ARGS__); break;                       \
      case 5: Body<5>(__VA_ARGS__); break;                       \
      default: Body<kTileRows>(__VA_ARGS__);                     \
    }                                                            \
    row += std::min<int64_t>(left, kTileRows);                   \
  }

}  // namespace refinery::kernels
#endif
