#include "worker/task/recover/row_kernels.h"

#include <algorithm>
#include <limits>

#include "worker/task/model/simd.h"

// One body per kernel as an always-inlined template; below, one clone set per kernel and storage type.
namespace refinery::recover {
namespace {

using namespace refinery::simd;  // NOLINT(google-build-using-namespace): the vocabulary of this file

using Bytes = uint8_t __attribute__((vector_size(16)));

constexpr int64_t kBlock = 2048;  // floats are summed in blocks of this many before they join a double

RF_INLINE Floats LoadCodes(const uint8_t* p) {
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(__builtin_convertvector(bytes, Ints), Floats);
}

template <typename T>
RF_INLINE void ExpandBody(const RowLayout& layout, const uint8_t* codes, const float* zeros, const float* scales, T* weight) {
  if (layout.group_of != nullptr) {
    for (int64_t c = 0; c < layout.columns; ++c) {
      const int32_t g = layout.group_of[c];
      Assign(weight + c, (static_cast<float>(codes[c]) - zeros[g]) * scales[g]);
    }
    return;
  }
  for (int64_t g = 0; g < layout.groups; ++g) {
    const int64_t begin = g * layout.group_size, end = std::min(layout.columns, begin + layout.group_size);
    const float scale = scales[g], zero = zeros[g];
    int64_t c = begin;
    for (; c + kLanes <= end; c += kLanes) Store(weight + c, (LoadCodes(codes + c) - zero) * scale);
    for (; c < end; ++c) Assign(weight + c, (static_cast<float>(codes[c]) - zero) * scale);
  }
}

template <typename T>
RF_INLINE void ScaleGradientBody(const RowLayout& layout, const uint8_t* codes, const float* zeros, const T* gradient,
                                 float* sums) {
  if (layout.group_of != nullptr) {
    for (int64_t g = 0; g < layout.groups; ++g) sums[g] = 0;
    for (int64_t c = 0; c < layout.columns; ++c) {
      const int32_t g = layout.group_of[c];
      sums[g] += ToFloat(gradient[c]) * (static_cast<float>(codes[c]) - zeros[g]);
    }
    return;
  }
  for (int64_t g = 0; g < layout.groups; ++g) {
    const int64_t begin = g * layout.group_size, end = std::min(layout.columns, begin + layout.group_size);
    const float zero = zeros[g];
    Floats lanes = {};
    int64_t c = begin;
    for (; c + kLanes <= end; c += kLanes) lanes += Load(gradient + c) * (LoadCodes(codes + c) - zero);
    float sum = Sum(lanes);
    for (; c < end; ++c) sum += ToFloat(gradient[c]) * (static_cast<float>(codes[c]) - zero);
    sums[g] = sum;
  }
}

template <typename T>
RF_INLINE float LargestOf(const T* x, int64_t n) {
  Floats lanes = Splat(-std::numeric_limits<float>::infinity());
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Floats v = Load(x + j);
    lanes = v > lanes ? v : lanes;
  }
  float largest = lanes[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) largest = std::max(largest, lanes[lane]);
  for (; j < n; ++j) largest = std::max(largest, ToFloat(x[j]));
  return largest;
}

// With a = teacher - max, b = student - max:  KL = sum p (a - b) - log sum e^a + log sum e^b.
template <typename T>
RF_INLINE double DivergenceBody(const T* teacher, T* student, int64_t n, float factor, float* scratch) {
  const float shift_a = LargestOf(teacher, n), shift_b = LargestOf(student, n);
  float *const ea = scratch, *const eb = scratch + n;
  double sum_a = 0, sum_b = 0, difference = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    Floats va = {}, vb = {}, vd = {};
    int64_t j = begin;
    for (; j + kLanes <= end; j += kLanes) {
      const Floats a = Load(teacher + j) - shift_a, b = Load(student + j) - shift_b;
      const Floats x = Exp(a), y = Exp(b);
      Store(ea + j, x);
      Store(eb + j, y);
      va += x;
      vb += y;
      vd += x * (a - b);
    }
    sum_a += Sum(va);
    sum_b += Sum(vb);
    difference += Sum(vd);
    for (; j < end; ++j) {
      const float a = ToFloat(teacher[j]) - shift_a, b = ToFloat(student[j]) - shift_b;
      ea[j] = ScalarExp(a);
      eb[j] = ScalarExp(b);
      sum_a += ea[j];
      sum_b += eb[j];
      difference += ea[j] * (a - b);
    }
  }
  if (factor != 0) {
    const float of_a = static_cast<float>(factor / sum_a), of_b = static_cast<float>(factor / sum_b);
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) Store(student + j, Load(eb + j) * of_b - Load(ea + j) * of_a);
    for (; j < n; ++j) Assign(student + j, eb[j] * of_b - ea[j] * of_a);
  }
  return difference / sum_a - std::log(sum_a) + std::log(sum_b);
}

}  // namespace

// target_clones does not apply to templates, hence a plain function per type behind each explicit specialization.
#define RF_KERNEL(T, Result, Name, Parameters, Arguments)                                   \
  RF_CPU_CLONES static Result Name##Clones Parameters { return Name##Body Arguments; }      \
  template <>                                                                               \
  Result Name##Row<T> Parameters {                                                          \
    return Name##Clones Arguments;                                                          \
  }

#define RF_KERNELS(T)                                                                                                       \
  RF_KERNEL(T, void, Expand,                                                                                                \
            (const RowLayout& layout, const uint8_t* codes, const float* zeros, const float* scales, T* weight),            \
            (layout, codes, zeros, scales, weight))                                                                         \
  RF_KERNEL(T, void, ScaleGradient,                                                                                         \
            (const RowLayout& layout, const uint8_t* codes, const float* zeros, const T* gradient, float* sums),            \
            (layout, codes, zeros, gradient, sums))                                                                         \
  RF_KERNEL(T, double, Divergence, (const T* teacher, T* student, int64_t n, float factor, float* scratch),                 \
            (teacher, student, n, factor, scratch))

RF_KERNELS(float)
RF_KERNELS(Bf16)

}  // namespace refinery::recover
