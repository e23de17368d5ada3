// worker/task/recover/row_kernels.h
//
// The inner loops of recovery, one row each: weights from codes and scales, the gradient of the scales from the gradient of the
// weights, and the divergence of two full distributions. No LibTorch here.
//
// Layout of a row of a linear layer: `columns` codes; group g of a column is group_of[column], or column / group_size where
// there is no group_of; the last group may be ragged.  w = scale[g] (code - zero[g]).
// Dtypes: T is float or simd::Bf16; arithmetic is float32, sums over a vocabulary end in double.
// Errors: none.  Threads: pure functions; rows are independent.

#pragma once

#include <cstdint>

#include "worker/task/model/bf16.h"

namespace refinery::recover {

struct RowLayout {
  int64_t columns = 0;
  int64_t groups = 0;
  int64_t group_size = 0;
  const int32_t* group_of = nullptr;  // [columns] or nullptr
};

// weight[c] = scales[g] (codes[c] - zeros[g]), rounded once to T.
template <typename T>
void ExpandRow(const RowLayout& layout, const uint8_t* codes, const float* zeros, const float* scales, T* weight);

// sums[g] = sum over the columns of g of gradient[c] (codes[c] - zeros[g]): d loss / d scales[g].
template <typename T>
void ScaleGradientRow(const RowLayout& layout, const uint8_t* codes, const float* zeros, const T* gradient, float* sums);

// KL(teacher || student) in nats of two rows of n logits. Where factor is not 0, the student's logits become
// factor * d KL / d logits = factor * (softmax(student) - softmax(teacher)).   scratch: 2 n floats of the calling thread.
template <typename T>
double DivergenceRow(const T* teacher, T* student, int64_t n, float factor, float* scratch);

}  // namespace refinery::recover
