#include "worker/task/generate/cpu_product.h"

#include <algorithm>

#include "worker/task/model/simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define RF_BF16_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#endif

namespace refinery::kernels {
namespace {

using namespace refinery::simd;  // NOLINT(google-build-using-namespace): the vocabulary of this file

// A tile is R rows of x by N outputs: R * N sums, N weights and one input fill the 32 vector registers.
constexpr int kMaxRows = 8;
constexpr int OutputsOfTile(int rows) { return rows > 6 ? 3 : 4; }
constexpr int64_t kPanel = 48;    // outputs whose weights stay in the second-level cache while all rows of x pass

// Calls Rows<R>(arguments, row, begin, end) for R = count, 1 to kMaxRows.
#define RF_SWITCH_ROWS(Rows, count, ...)    \
  switch (count) {                          \
    case 1: Rows<1>(__VA_ARGS__); break;    \
    case 2: Rows<2>(__VA_ARGS__); break;    \
    case 3: Rows<3>(__VA_ARGS__); break;    \
    case 4: Rows<4>(__VA_ARGS__); break;    \
    case 5: Rows<5>(__VA_ARGS__); break;    \
    case 6: Rows<6>(__VA_ARGS__); break;    \
    case 7: Rows<7>(__VA_ARGS__); break;    \
    default: Rows<kMaxRows>(__VA_ARGS__);   \
  }

template <typename T>
RF_INLINE void Finish(const ProductArguments<T>& a, int64_t row, int64_t output, float sum) {
  float* y = a.y + row * a.y_stride + output;
  if (a.bias != nullptr) sum += ToFloat(a.bias[output]);
  *y = a.accumulate ? *y + sum : sum;
}

template <int R, int N, typename T>
RF_INLINE void FloatTile(const ProductArguments<T>& a, int64_t row, int64_t output) {
  const int64_t k = a.inputs, whole = k / kLanes * kLanes;
  const T* x = a.x + row * k;
  const T* w = a.weight + output * k;
  Floats sums[R][N] = {};
  for (int64_t c = 0; c < whole; c += kLanes) {
    Floats weights[N];
    for (int n = 0; n < N; ++n) weights[n] = Load(w + n * k + c);
    for (int r = 0; r < R; ++r) {
      const Floats input = Load(x + r * k + c);
      for (int n = 0; n < N; ++n) sums[r][n] += input * weights[n];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) {
      float sum = Sum(sums[r][n]);
      for (int64_t c = whole; c < k; ++c) sum += ToFloat(x[r * k + c]) * ToFloat(w[n * k + c]);
      Finish(a, row + r, output + n, sum);
    }
  }
}

template <int R, typename T>
RF_INLINE void FloatRows(const ProductArguments<T>& a, int64_t row, int64_t begin, int64_t end) {
  int64_t n = begin;
  constexpr int kOutputs = OutputsOfTile(R);
  for (; n + kOutputs <= end; n += kOutputs) FloatTile<R, kOutputs>(a, row, n);
  for (; n < end; ++n) FloatTile<R, 1>(a, row, n);
}

template <typename T>
RF_INLINE void FloatProduct(const ProductArguments<T>& a, int64_t begin, int64_t end) {
  const int64_t groups = (a.rows + kMaxRows - 1) / kMaxRows;  // of nearly equal size
  for (int64_t panel = begin; panel < end; panel += kPanel) {
    const int64_t stop = std::min(end, panel + kPanel);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t row = a.rows * g / groups, count = a.rows * (g + 1) / groups - row;
      RF_SWITCH_ROWS(FloatRows, count, a, row, panel, stop);
    }
  }
}

RF_CPU_CLONES void FloatProductClones(const ProductArguments<float>& a, int64_t begin, int64_t end) {
  FloatProduct(a, begin, end);
}
RF_CPU_CLONES void FloatProductClones(const ProductArguments<Bf16>& a, int64_t begin, int64_t end) {
  FloatProduct(a, begin, end);
}

#if defined(__x86_64__)
RF_BF16_TARGET RF_INLINE __m512bh LoadPairs(const Bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
RF_BF16_TARGET RF_INLINE __m512bh LoadPairs(const Bf16* p, __mmask32 mask) {
  return (__m512bh)_mm512_maskz_loadu_epi16(mask, p);
}

template <int R, int N>
RF_BF16_TARGET RF_INLINE void PairTile(const ProductArguments<Bf16>& a, int64_t row, int64_t output) {
  const int64_t k = a.inputs, whole = k / 32 * 32;
  const Bf16* x = a.x + row * k;
  const Bf16* w = a.weight + output * k;
  __m512 sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n] = _mm512_setzero_ps();
  }
  for (int64_t c = 0; c < whole; c += 32) {
    __m512bh weights[N];
    for (int n = 0; n < N; ++n) {
      weights[n] = LoadPairs(w + n * k + c);
      if (R <= kMaxRows) __builtin_prefetch(w + (n + N) * k + c);
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
    for (int n = 0; n < N; ++n) Finish(a, row + r, output + n, Sum((Floats)sums[r][n]));
  }
}

template <int R>
RF_BF16_TARGET RF_INLINE void PairRows(const ProductArguments<Bf16>& a, int64_t row, int64_t begin, int64_t end) {
  int64_t n = begin;
  constexpr int kOutputs = OutputsOfTile(R);
  for (; n + kOutputs <= end; n += kOutputs) PairTile<R, kOutputs>(a, row, n);
  for (; n < end; ++n) PairTile<R, 1>(a, row, n);
}

RF_BF16_TARGET void PairProduct(const ProductArguments<Bf16>& a, int64_t begin, int64_t end) {
  const int64_t groups = (a.rows + kMaxRows - 1) / kMaxRows;  // of nearly equal size
  for (int64_t panel = begin; panel < end; panel += kPanel) {
    const int64_t stop = std::min(end, panel + kPanel);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t row = a.rows * g / groups, count = a.rows * (g + 1) / groups - row;
      RF_SWITCH_ROWS(PairRows, count, a, row, panel, stop);
    }
  }
}

bool HasPairProduct() {
  static const bool has = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has;
}
#endif

}  // namespace

template <>
void Product<float>(const ProductArguments<float>& arguments, int64_t begin, int64_t end) {
  FloatProductClones(arguments, begin, end);
}

template <>
void Product<Bf16>(const ProductArguments<Bf16>& arguments, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  if (HasPairProduct()) return PairProduct(arguments, begin, end);
#endif
  FloatProductClones(arguments, begin, end);
}

}  // namespace refinery::kernels
