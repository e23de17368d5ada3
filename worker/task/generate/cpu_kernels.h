// worker/task/generate/cpu_kernels.h
//
// What a decoding step needs beside matrix products, on raw pointers without torch: softmax weights, norms, rotary embedding,
// and attention over the cache. Activations between the products are float32; T (float or simd::Bf16) is the model's dtype.
//
// The cache of one (slot, key-value head) with room for `capacity` positions (a multiple of 16):
//   keys    [capacity/16, d, 16]   transposed within blocks of 16 positions, so that scores need no horizontal sums
//   values  [capacity, d]
//
// Threads: pure functions on what they are given.

#pragma once

#include <cstdint>

#include "worker/task/model/bf16.h"

namespace refinery::kernels {

constexpr int64_t kKeyBlock = 16;

// x = exp((x - highest) * scale); returns the sum.
double ExpInPlace(float* x, int64_t count, float highest, float scale);

// y = x / rms(x) * weight over rows.
template <typename T>
void NormRows(const float* x, const T* weight, T* y, int64_t rows, int64_t columns, float eps);

// The same in place on one head of float32, then the rotary embedding; weight may be null (no norm).
template <typename T>
void NormAndRotateHead(float* head, const T* weight, const float* cos, const float* sin, int64_t head_dim, float eps);

// out = silu(gate) * up over one row.
template <typename T>
void SiluMulRow(const float* gate, const float* up, T* out, int64_t width);

template <typename T>
void WriteKey(const float* key, T* keys, int64_t position, int64_t head_dim);
template <typename T>
void WriteValue(const float* value, T* values, int64_t position, int64_t head_dim);

// `heads` query heads [heads, d] that share one key-value head attend to positions [first, last] of its cache.
// scores is scratch of heads * (last / 16 * 16 + 16) floats; out [heads, d].
template <typename T>
struct AttentionItem {
  const float* queries;
  const T* keys;
  const T* values;
  T* out;
  float* scores;
  int64_t heads, head_dim, first, last;
  float scale;
};
template <typename T>
void AttendCached(const AttentionItem<T>& item);

// row [columns] -> float32.
template <typename T>
void Widen(const T* row, float* out, int64_t columns);

}  // namespace refinery::kernels
