#include "worker/task/distill/kd_row.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace refinery::distill {
namespace {

// Floats are summed in blocks of this many before they join a double.
constexpr int64_t kBlock = 1024;

// Compiled once per instruction set; the loader picks. Inlined helpers follow their caller.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define RF_VECTOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RF_VECTOR_CLONES
#endif

[[gnu::always_inline]] inline float Load(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}
[[gnu::always_inline]] inline float Load(float value) { return value; }

// Rounds to nearest, ties to even; the values here are finite.
[[gnu::always_inline]] inline void Store(float value, uint16_t* out) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  *out = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
[[gnu::always_inline]] inline void Store(float value, float* out) { *out = value; }

// exp for x <= 0, 2 ulp; 0 below -87. Range reduction by ln 2 in two parts, then a degree-6 polynomial of 2^f's
// exponent (coefficients: Cephes expf). Written without branches so that it vectorises.
[[gnu::always_inline]] inline float Exp(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const float n = shifted - 12582912.0f;
  const float f = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const uint32_t exponent = (std::bit_cast<uint32_t>(shifted) + 127u) << 23;
  const float value = p * std::bit_cast<float>(exponent);
  return x < -87.0f ? 0.0f : value;
}

template <typename T>
[[gnu::always_inline]] inline float MaxOf(const T* logits, int64_t n) {
  float largest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < n; ++j) {
    const float value = Load(logits[j]);
    largest = value > largest ? value : largest;
  }
  return largest;
}

// out[j] = exp((logits[j] - shift) * scale); returns the sum.
template <typename T>
[[gnu::always_inline]] inline double ExpInto(const T* logits, int64_t n, float shift, float scale, float* out) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = begin; j < end; ++j) {
      const float value = Exp((Load(logits[j]) - shift) * scale);
      out[j] = value;
      sum += value;
    }
    total += sum;
  }
  return total;
}

[[gnu::always_inline]] inline double SumOf(const float* values, int64_t n) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = begin; j < end; ++j) sum += values[j];
    total += sum;
  }
  return total;
}

// logits[j] <- tempered[j] * tempered_factor + exp(logits[j] - shift) * plain_factor; the second part only where used.
template <typename T>
[[gnu::always_inline]] inline void WriteGradient(T* logits, int64_t n, const float* tempered, float tempered_factor,
                                                 float shift, float plain_factor) {
  if (plain_factor == 0) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) Store(tempered[j] * tempered_factor, &logits[j]);
    return;
  }
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    Store(tempered[j] * tempered_factor + Exp(Load(logits[j]) - shift) * plain_factor, &logits[j]);
  }
}

// p log(p / q) - p + q, which is >= 0 and sums to the KL divergence over buckets that sum to one on both sides.
double Divergence(double log_p, double log_q) {
  if (std::isinf(log_p)) return std::exp(log_q);
  const double d = log_q - log_p;
  const double excess = std::expm1(d) - d;
  return std::exp(log_p) * (excess < 0 ? 0 : excess);  // below 0 by rounding only; NaN stays NaN
}

template <typename T>
[[gnu::always_inline]] inline RowResult Row(T* logits, const TeacherRow& teacher, int32_t target,
                                            const RowSettings& settings, float* scratch, double* teacher_scratch) {
  const int64_t n = settings.vocabulary;
  const int64_t entries = teacher.entries;
  const double inverse = 1 / settings.temperature;
  const bool plain = settings.temperature == 1;
  const float largest = MaxOf(logits, n);
  const double target_logit = Load(logits[target]) - largest;

  // Sums at temperature 1 (cross-entropy) and T (KL). The student's mass outside the teacher's entries is summed
  // without them, never as a difference: it may be far smaller than the rounding error of the whole.
  double plain_sum = plain ? 0 : ExpInto(logits, n, largest, 1.0f, scratch);
  double sum = ExpInto(logits, n, largest, static_cast<float>(inverse), scratch);
  double entries_sum = 0;
  double* student = teacher_scratch + entries;  // (logit - largest) / T of each entry
  for (int64_t k = 0; k < entries; ++k) {
    const int32_t id = teacher.ids[k];
    student[k] = (static_cast<double>(Load(logits[id])) - largest) * inverse;
    entries_sum += std::exp(student[k]);
    scratch[id] = 0;
  }
  double outside = 0;
  if (entries > 0) {
    outside = SumOf(scratch, n);
    sum = outside + entries_sum;
    outside = std::max(outside, 1e-37);
  }
  if (plain) plain_sum = sum;
  const double log_sum = std::log(sum);

  RowResult result{.kl = 0, .cross_entropy = std::log(plain_sum) - target_logit};
  TeacherDistribution p{.log_probabilities = teacher_scratch};
  double tail = 0;
  if (entries > 0) {
    TeacherAtTemperature(teacher, settings.temperature, &p);
    for (int64_t k = 0; k < entries; ++k) result.kl += Divergence(p.log_probabilities[k], student[k] - log_sum);
    if (entries < n) result.kl += Divergence(p.tail_log_probability, std::log(outside) - log_sum);
    tail = std::exp(p.tail_log_probability);
  }
  if (!settings.gradient) return result;

  // d KL_T / d z_j = (q_j - p_j) / T for an entry, q_j (1 - p_tail / q_outside) / T for the rest; CE: softmax - onehot.
  const double kl_weight = entries > 0 ? settings.kl_weight * inverse : 0;
  const double ce_weight = settings.cross_entropy_weight;
  const double rest = kl_weight * (1 / sum - (entries > 0 ? tail / outside : 0));
  const double plain_factor = ce_weight / plain_sum;
  float target_gradient =
      static_cast<float>(scratch[target] * rest + ce_weight * (std::exp(target_logit) / plain_sum - 1));
  for (int64_t k = 0; k < entries; ++k) {  // kept aside: the pass below overwrites the logits
    const int32_t id = teacher.ids[k];
    const double softmax = std::exp(static_cast<double>(Load(logits[id])) - largest) / plain_sum;
    teacher_scratch[k] = kl_weight * (std::exp(student[k] - log_sum) - std::exp(p.log_probabilities[k])) +
                         ce_weight * (softmax - (id == target ? 1 : 0));
    if (id == target) target_gradient = static_cast<float>(teacher_scratch[k]);
  }
  if (plain) {
    WriteGradient(logits, n, scratch, static_cast<float>(rest + plain_factor), largest, 0.0f);
  } else {
    WriteGradient(logits, n, scratch, static_cast<float>(rest), largest, static_cast<float>(plain_factor));
  }
  for (int64_t k = 0; k < entries; ++k) Store(static_cast<float>(teacher_scratch[k]), &logits[teacher.ids[k]]);
  Store(target_gradient, &logits[target]);
  return result;
}

}  // namespace

void TeacherAtTemperature(const TeacherRow& teacher, double temperature, TeacherDistribution* out) {
  double largest = teacher.tail;
  for (int64_t k = 0; k < teacher.entries; ++k) {
    out->log_probabilities[k] = teacher.logits[k] / temperature;
    largest = std::max(largest, out->log_probabilities[k]);
  }
  double sum = std::exp(teacher.tail - largest);
  for (int64_t k = 0; k < teacher.entries; ++k) sum += std::exp(out->log_probabilities[k] - largest);
  const double log_partition = largest + std::log(sum);
  for (int64_t k = 0; k < teacher.entries; ++k) out->log_probabilities[k] -= log_partition;
  out->tail_log_probability = teacher.tail - log_partition;
}

RF_VECTOR_CLONES
RowResult KdRow(uint16_t* bfloat16_logits, const TeacherRow& teacher, int32_t target, const RowSettings& settings,
                float* scratch, double* teacher_scratch) {
  return Row(bfloat16_logits, teacher, target, settings, scratch, teacher_scratch);
}

RF_VECTOR_CLONES
RowResult KdRow(float* logits, const TeacherRow& teacher, int32_t target, const RowSettings& settings, float* scratch,
                double* teacher_scratch) {
  return Row(logits, teacher, target, settings, scratch, teacher_scratch);
}

}  // namespace refinery::distill
