// worker/task/distill/kd_loss.h
//
// Knowledge-distillation loss over answer positions, fused with the output head: logits, softmax, loss and its
// gradient are made chunk by chunk, so no [tokens, vocabulary] tensor lives longer than a chunk and the frozen head
// gets no gradient.
//
//   loss = kl_weight * T^2 * KL_T(teacher || student) + (1 - kl_weight) * cross-entropy
//
// in nats, mean over answer tokens.
//
// KL_T: both sides at temperature T (Hinton et al. 2015, arXiv:1503.02531). The teacher's K entries are exact; the
// rest of its mass is one tail bucket compared with the student's mass outside the same K entries, which is summed
// exactly. The teacher's tail is exact at the temperatures of the cache's grid, T = 1 among them, and interpolated
// between them (tail_grid.h). KL_T is never negative.
//
// Shapes: N answer positions, H hidden size, V vocabulary, K teacher entries.
// Dtypes: head products in hidden's dtype; softmax, KL and gradient in float32 (float64 for float64 hidden).
// Devices: on the CPU, bfloat16 and float32 run in one fused kernel over rows; anything else takes the same steps in
// ATen.
// Errors: c10::Error on shape bugs and ids outside the vocabulary, and for a temperature outside the cache's
// grid.  Threads: no shared state.

#pragma once

#include <ATen/core/Tensor.h>

#include "worker/task/distill/logit_cache.h"

namespace refinery::distill {

struct KdSettings {
  double kl_weight = 1.0;    // in [0, 1]
  double temperature = 1.0;  // in [kMinTemperature, kMaxTemperature] of tail_grid.h, with a teacher
  int64_t chunk = 512;       // answer positions per chunk
};

struct KdResult {
  at::Tensor loss;           // scalar float32, differentiable with respect to `hidden`
  double kl = 0;             // unscaled KL at temperature T, sum / normalizer, i.e. nats per token when it is N
  double cross_entropy = 0;  // likewise, at temperature 1
};

// hidden   [N, H]  the student's final hidden states at the positions that predict the N answer tokens
// lm_head  [V, H]  frozen
// targets  [N]     int64 answer tokens
// teacher  rows for the same N positions (may be undefined tensors when kl_weight == 0)
// normalizer: number of answer tokens of the whole optimizer step (so that micro-batches add up exactly); 0 = N
KdResult KdLoss(const at::Tensor& hidden, const at::Tensor& lm_head, const at::Tensor& targets,
                const TeacherRows& teacher, const KdSettings& settings, int64_t normalizer = 0);

}  // namespace refinery::distill
