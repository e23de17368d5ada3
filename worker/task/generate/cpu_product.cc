#include "worker/task/generate/cpu_product.h"

#include <algorithm>

#include "worker/task/model/pair_simd.h"
#include "worker/task/model/simd.h"

namespace refinery::kernels {

#if defined(__x86_64__)
void PairProduct(const ProductArguments<Bf16>& arguments, int64_t begin, int64_t end);  // pair_product.cc
#endif

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

}  // namespace

template <>
void Product<float>(const ProductArguments<float>& arguments, int64_t begin, int64_t end) {
  FloatProductClones(arguments, begin, end);
}

template <>
void Product<Bf16>(const ProductArguments<Bf16>& arguments, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  if (HasPairs()) return PairProduct(arguments, begin, end);
#endif
  FloatProductClones(arguments, begin, end);
}

}  // namespace refinery::kernels
