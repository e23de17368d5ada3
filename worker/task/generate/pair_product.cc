// Product<Bf16> by the dot-product instructions of AVX512_BF16. One chain of sums per (row, output), the same whatever else is in
// the batch. One to three rows take one row of weights after the other, which is the order the memory prefetcher follows: twice
// as fast as four rows at once, measured. More rows share the weights in tiles, and ask for the next ones in that same order.

#include "worker/task/generate/cpu_product.h"
#include "worker/task/model/pair_simd.h"

#if defined(__x86_64__)
#include <algorithm>

namespace refinery::kernels {
namespace {

constexpr int64_t kPanel = 16;        // outputs that are summed up together
constexpr int kTileRows = 4, kTileOutputs = 4;
constexpr int64_t kAheadBytes = 8192;

// sums[r * kPanel + n] of rows [0, R) and outputs [0, N), before the sum over lanes.
template <int R, int N, bool kPrefetch>
RF_BF16_INLINE void Tile(const Bf16* x, const Bf16* w, int64_t k, __m512* out) {
  const int64_t whole = k / 32 * 32;
  const char* ahead = reinterpret_cast<const char*>(w) + kAheadBytes;
  __m512 sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n] = _mm512_setzero_ps();
  }
  for (int64_t c = 0; c < whole; c += 32) {
    __m512bh weights[N];
    for (int n = 0; n < N; ++n) weights[n] = LoadPairs(w + n * k + c);
    if (kPrefetch) {
      for (int n = 0; n < N; ++n) _mm_prefetch(ahead + n * 64, _MM_HINT_T0);
      ahead += 64 * N;
    }
    for (int r = 0; r < R; ++r) {
      const __m512bh input = LoadPairs(x + r * k + c);
      for (int n = 0; n < N; ++n) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], input, weights[n]);
    }
  }
  if (whole < k) {
    const __mmask32 mask = (1u << (k - whole)) - 1;
    for (int r = 0; r < R; ++r) {
      const __m512bh input = LoadPairs(x + r * k + whole, mask);
      for (int n = 0; n < N; ++n) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], input, LoadPairs(w + n * k + whole, mask));
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) out[r * kPanel + n] = sums[r][n];
  }
}

// Rows [row, row + R) by outputs [output, output + count), count <= kPanel.
template <int R, int N, bool kPrefetch>
RF_BF16_TARGET void Panel(const ProductArguments<Bf16>& a, int64_t row, int64_t output, int64_t count) {
  __m512 sums[R * kPanel];
  const Bf16 *x = a.x + row * a.inputs, *w = a.weight + output * a.inputs;
  if (count < kPanel) std::fill_n(sums, R * kPanel, _mm512_setzero_ps());
  int64_t n = 0;
  for (; n + N <= count; n += N) Tile<R, N, kPrefetch>(x, w + n * a.inputs, a.inputs, sums + n);
  for (; n < count; ++n) Tile<R, 1, false>(x, w + n * a.inputs, a.inputs, sums + n);
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  const __m512 bias = a.bias == nullptr ? _mm512_setzero_ps() : WidenHalves(a.bias + output, mask);
  for (int r = 0; r < R; ++r) {
    float* y = a.y + (row + r) * a.y_stride + output;
    __m512 sum = SumRows(sums + r * kPanel);
    if (a.bias != nullptr) sum = _mm512_add_ps(sum, bias);
    if (a.accumulate) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y), sum);
    _mm512_mask_storeu_ps(y, mask, sum);
  }
}

template <bool kPrefetch>
RF_BF16_TARGET void Group(const ProductArguments<Bf16>& a, int64_t row, int64_t rows, int64_t output, int64_t count) {
  switch (rows) {
    case 1: return Panel<1, kTileOutputs, kPrefetch>(a, row, output, count);
    case 2: return Panel<2, kTileOutputs, kPrefetch>(a, row, output, count);
    case 3: return Panel<3, kTileOutputs, kPrefetch>(a, row, output, count);
    default: return Panel<kTileRows, kTileOutputs, kPrefetch>(a, row, output, count);
  }
}

}  // namespace

RF_BF16_TARGET void PairProduct(const ProductArguments<Bf16>& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += kPanel) {
    const int64_t count = std::min(kPanel, end - n);
    switch (a.rows) {
      case 0: return;
      case 1: Panel<1, 1, false>(a, 0, n, count); continue;
      case 2: Panel<2, 1, false>(a, 0, n, count); continue;
      case 3: Panel<3, 1, false>(a, 0, n, count); continue;
      default: break;
    }
    Group<true>(a, 0, kTileRows, n, count);
    for (int64_t row = kTileRows; row < a.rows; row += kTileRows) {
      Group<false>(a, row, std::min<int64_t>(kTileRows, a.rows - row), n, count);
    }
  }
}

}  // namespace refinery::kernels
#endif
