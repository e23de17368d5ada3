#include "worker/task/generate/cpu_kernels.h"

#include <limits>

#include "worker/task/model/simd.h"

namespace refinery::kernels {
namespace {

using namespace refinery::simd;  // NOLINT(google-build-using-namespace): the vocabulary of this file

RF_INLINE double ExpInPlaceBody(float* x, int64_t count, float highest, float scale) {
  const int64_t whole = count / kLanes * kLanes;
  double total = 0;
  Floats part = {};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Floats shifted = (Load(x + i) - highest) * scale;
    // Beyond the range of Exp's argument the weight is nothing, not e^-87.
    const Floats weight = shifted < -87.0f ? Splat(0.0f) : Exp(shifted);
    Store(x + i, weight);
    part += weight;
    if ((i & 4095) == 0) {  // float sums of a large vocabulary would lose the small weights
      total += Sum(part);
      part = Floats{};
    }
  }
  total += Sum(part);
  for (int64_t i = whole; i < count; ++i) {
    const float shifted = (x[i] - highest) * scale;
    x[i] = shifted < -87.0f ? 0.0f : ScalarExp(shifted);
    total += x[i];
  }
  return total;
}

RF_INLINE float InverseRms(const float* x, int64_t columns, float eps) {
  const int64_t whole = columns / kLanes * kLanes;
  Floats squares = {};
  for (int64_t c = 0; c < whole; c += kLanes) squares += Load(x + c) * Load(x + c);
  float sum = Sum(squares);
  for (int64_t c = whole; c < columns; ++c) sum += x[c] * x[c];
  return 1.0f / std::sqrt(sum / static_cast<float>(columns) + eps);
}

template <typename T, typename Out>
RF_INLINE void Scale(const float* x, const T* weight, Out* y, int64_t columns, float scale) {
  const int64_t whole = columns / kLanes * kLanes;
  for (int64_t c = 0; c < whole; c += kLanes) Store(y + c, Load(x + c) * scale * Load(weight + c));
  for (int64_t c = whole; c < columns; ++c) Assign(y + c, x[c] * scale * ToFloat(weight[c]));
}

template <typename T>
RF_INLINE void NormRowsBody(const float* x, const T* weight, T* y, int64_t rows, int64_t columns, float eps) {
  for (int64_t r = 0; r < rows; ++r, x += columns, y += columns) Scale(x, weight, y, columns, InverseRms(x, columns, eps));
}

template <typename T>
RF_INLINE void NormAndRotateHeadBody(float* head, const T* weight, const float* cos, const float* sin, int64_t head_dim,
                                     float eps) {
  if (weight != nullptr) Scale(head, weight, head, head_dim, InverseRms(head, head_dim, eps));
  const int64_t half = head_dim / 2, whole = half / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Floats c = Load(cos + i), s = Load(sin + i), a = Load(head + i), b = Load(head + half + i);
    Store(head + i, a * c - b * s);
    Store(head + half + i, b * c + a * s);
  }
  for (int64_t i = whole; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    head[i] = a * cos[i] - b * sin[i];
    head[half + i] = b * cos[i] + a * sin[i];
  }
}

template <typename T>
RF_INLINE void SiluMulRowBody(const float* gate, const float* up, T* out, int64_t width) {
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t c = 0; c < whole; c += kLanes) {
    const Floats g = Load(gate + c);
    Store(out + c, g / (1.0f + Exp(-g)) * Load(up + c));
  }
  for (int64_t c = whole; c < width; ++c) Assign(out + c, gate[c] / (1.0f + ScalarExp(-gate[c])) * up[c]);
}

template <typename T>
RF_INLINE void WriteKeyBody(const float* key, T* keys, int64_t position, int64_t head_dim) {
  T* column = keys + position / kKeyBlock * kKeyBlock * head_dim + position % kKeyBlock;
  for (int64_t j = 0; j < head_dim; ++j) Assign(column + j * kKeyBlock, key[j]);
}

template <typename T>
RF_INLINE void WriteValueBody(const float* value, T* values, int64_t position, int64_t head_dim) {
  T* row = values + position * head_dim;
  for (int64_t j = 0; j < head_dim; ++j) Assign(row + j, value[j]);
}

// Scores of R heads against Blocks * 16 positions; `stride` floats lie between the heads' score rows.
template <int R, int Blocks, typename T>
RF_INLINE void ScoreBlocks(const float* queries, const T* keys, int64_t d, float scale, float* scores, int64_t stride) {
  Floats sums[R][Blocks] = {};
  for (int64_t j = 0; j < d; ++j) {
    Floats k[Blocks];
    for (int b = 0; b < Blocks; ++b) k[b] = Load(keys + (b * d + j) * kKeyBlock);
    for (int r = 0; r < R; ++r) {
      const float q = queries[r * d + j];
      for (int b = 0; b < Blocks; ++b) sums[r][b] += q * k[b];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < Blocks; ++b) Store(scores + r * stride + b * kKeyBlock, sums[r][b] * scale);
  }
}

// out[r][0 .. 16 Vectors) = sum over positions of weight[r][t] * values[t][...], times inverse[r].
template <int R, int Vectors, typename T>
RF_INLINE void MixValues(const T* values, int64_t d, const float* weights, int64_t stride, int64_t first, int64_t last,
                         const float* inverse, T* out) {
  Floats sums[R][Vectors] = {};
  for (int64_t t = first; t <= last; ++t) {
    Floats v[Vectors];
    for (int i = 0; i < Vectors; ++i) v[i] = Load(values + t * d + i * kLanes);
    for (int r = 0; r < R; ++r) {
      const float w = weights[r * stride + t];
      for (int i = 0; i < Vectors; ++i) sums[r][i] += w * v[i];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < Vectors; ++i) Store(out + r * d + i * kLanes, sums[r][i] * inverse[r]);
  }
}

template <int R, typename T>
RF_INLINE void AttendHeads(const AttentionItem<T>& item, int64_t head) {
  const int64_t d = item.head_dim, block0 = item.first / kKeyBlock, blocks = item.last / kKeyBlock + 1;
  const int64_t stride = blocks * kKeyBlock;
  const float* queries = item.queries + head * d;
  float* scores = item.scores;
  int64_t b = block0;
  for (; b + 4 <= blocks; b += 4) {
    ScoreBlocks<R, 4>(queries, item.keys + b * d * kKeyBlock, d, item.scale, scores + b * kKeyBlock, stride);
  }
  for (; b < blocks; ++b) {
    ScoreBlocks<R, 1>(queries, item.keys + b * d * kKeyBlock, d, item.scale, scores + b * kKeyBlock, stride);
  }
  float inverse[R];
  for (int r = 0; r < R; ++r) {
    float* row = scores + r * stride;
    float highest = -std::numeric_limits<float>::infinity();
    for (int64_t t = item.first; t <= item.last; ++t) highest = row[t] > highest ? row[t] : highest;
    inverse[r] = static_cast<float>(1.0 / ExpInPlaceBody(row + item.first, item.last - item.first + 1, highest, 1.0f));
  }
  T* out = item.out + head * d;
  int64_t column = 0;
  for (; column + 4 * kLanes <= d; column += 4 * kLanes) {
    MixValues<R, 4>(item.values + column, d, scores, stride, item.first, item.last, inverse, out + column);
  }
  for (; column + kLanes <= d; column += kLanes) {
    MixValues<R, 1>(item.values + column, d, scores, stride, item.first, item.last, inverse, out + column);
  }
  for (; column < d; ++column) {
    for (int r = 0; r < R; ++r) {
      float sum = 0;
      for (int64_t t = item.first; t <= item.last; ++t) sum += scores[r * stride + t] * ToFloat(item.values[t * d + column]);
      Assign(out + r * d + column, sum * inverse[r]);
    }
  }
}

template <typename T>
RF_INLINE void AttendCachedBody(const AttentionItem<T>& item) {
  int64_t head = 0;
  for (; head + 4 <= item.heads; head += 4) AttendHeads<4>(item, head);
  switch (item.heads - head) {
    case 3: return AttendHeads<3>(item, head);
    case 2: return AttendHeads<2>(item, head);
    case 1: return AttendHeads<1>(item, head);
    default: return;
  }
}

template <typename T>
RF_INLINE void WidenBody(const T* row, float* out, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c) out[c] = ToFloat(row[c]);
}

}  // namespace

RF_CPU_CLONES double ExpInPlace(float* x, int64_t count, float highest, float scale) {
  return ExpInPlaceBody(x, count, highest, scale);
}

// target_clones does not apply to templates, hence a plain overload per type behind each explicit specialization.
#define RF_KERNEL(T, Name, Parameters, Arguments)                              \
  RF_CPU_CLONES static void Name##Clones Parameters { Name##Body Arguments; }  \
  template <>                                                                  \
  void Name<T> Parameters {                                                    \
    Name##Clones Arguments;                                                    \
  }

#define RF_KERNELS(T)                                                                                               \
  RF_KERNEL(T, NormRows, (const float* x, const T* weight, T* y, int64_t rows, int64_t columns, float eps),         \
            (x, weight, y, rows, columns, eps))                                                                     \
  RF_KERNEL(T, NormAndRotateHead,                                                                                   \
            (float* head, const T* weight, const float* cos, const float* sin, int64_t head_dim, float eps),        \
            (head, weight, cos, sin, head_dim, eps))                                                                \
  RF_KERNEL(T, SiluMulRow, (const float* gate, const float* up, T* out, int64_t width), (gate, up, out, width))     \
  RF_KERNEL(T, WriteKey, (const float* key, T* keys, int64_t position, int64_t head_dim),                           \
            (key, keys, position, head_dim))                                                                        \
  RF_KERNEL(T, WriteValue, (const float* value, T* values, int64_t position, int64_t head_dim),                     \
            (value, values, position, head_dim))                                                                    \
  RF_KERNEL(T, AttendCached, (const AttentionItem<T>& item), (item))                                                \
  RF_KERNEL(T, Widen, (const T* row, float* out, int64_t columns), (row, out, columns))

RF_KERNELS(float)
RF_KERNELS(Bf16)

}  // namespace refinery::kernels
