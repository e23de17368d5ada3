// worker/task/recover/divergence.h
//
// KL(source || tuned) over the whole vocabulary at temperature 1, from the final hidden states of both models, and its gradient
// with respect to those of the tuned one. Head products, softmax and gradient go chunk by chunk: no [tokens, vocabulary] tensor.
//
// Shapes: N positions, H hidden size, V vocabulary.  Dtypes: hidden states and head of one float dtype, logits in it too;
// softmax in float32, sums in double.
// Errors: c10::Error on shape bugs.  Threads: one caller.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace refinery::recover {

struct Divergence {
  double sum = 0;       // nats, over the N positions; NaN where a logit is not finite
  at::Tensor gradient;  // [N, H] d (sum / normalizer) / d hidden; undefined where not wanted
};

struct DivergenceOptions {
  double normalizer = 0;  // of the gradient; 0 = no gradient wanted
  int64_t chunk = 256;    // positions per product with the head
};

// hidden, source_hidden [N, H]; head [V, H], of both models.
Divergence SumDivergence(const at::Tensor& hidden, const at::Tensor& source_hidden, const at::Tensor& head,
                         const DivergenceOptions& options);

}  // namespace refinery::recover
