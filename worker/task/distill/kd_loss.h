// worker/task/distill/kd_loss.h
//
// Knowledge-distillation loss over answer positions, fused with the output head: logits, softmax, loss and its gradient are
// made chunk by chunk, so no [tokens, vocabulary] tensor lives longer than a chunk and the frozen head gets no gradient.
//
//   loss = kl_weight * T^2 * KL_T(teacher || student) + (1 - kl_weight) * cross-entropy        (nats, mean over answer tokens)
//
// KL_T: both sides at temperature T (Hinton et al. 2015, arXiv:1503.02531). The teacher's K entries are exact; the rest of its
// mass is one tail bucket compared with the student's mass outside the same K entries.

#pragma once

#include <ATen/core/Tensor.h>

#include "worker/task/distill/logit_cache.h"

namespace refinery::distill {

struct KdSettings {
  double kl_weight = 1.0;    // in [0, 1]
  double temperature = 1.0;  // > 0
  int64_t chunk = 512;       // answer positions per chunk
};

struct KdResult {
  at::Tensor loss;           // scalar float32, differentiable with respect to `hidden`
  double kl = 0;             // unscaled KL at temperature T, nats per token
  double cross_entropy = 0;  // nats per token
};

// hidden   [N, H]  the student's final hidden states at the positions that predict the N answer tokens
// lm_head  [V, H]  frozen
// targets  [N]     int64 answer tokens
// teacher  rows for the same N positions (may be undefined tensors when kl_weight == 0)
// normalizer: number of answer tokens of the whole optimizer step (so that micro-batches add up exactly); 0 = N
KdResult KdLoss(const at::Tensor& hidden, const at::Tensor& lm_head, const at::Tensor& targets, const TeacherRows& teacher,
                const KdSettings& settings, int64_t normalizer = 0);

}  // namespace refinery::distill
