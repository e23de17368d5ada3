// worker/task/eval/kl.h
//
// How far a model is from its teacher: KL(teacher || model) at temperature 1 over the answer tokens of held-out examples, from
// the teacher's cached top-k log-probabilities. The mass outside the teacher's K entries is one bucket on both sides, as in
// the distillation loss; so the value is a lower bound of the full divergence, and 0 for the teacher itself.
//
// Units: nats per token.  Dtypes: logits -> float32, sums float64.

#pragma once

#include <cstdint>
#include <vector>

#include "worker/task/data/encoded.h"
#include "worker/task/distill/logit_cache.h"
#include "worker/task/model/causal_lm.h"
#include "worker/task/runtime/reporter.h"

namespace refinery::eval {

struct KlResult {
  int64_t examples = 0;
  int64_t tokens = 0;
  double mean = 0;                  // over examples of their mean per token
  double standard_error = 0;        // of that mean, over examples
  double token_mean = 0;            // over all tokens
  double top1_agreement = 0;        // share of tokens whose first choice is the teacher's
  std::vector<double> per_example;
};

struct KlOptions {
  int64_t batch_tokens = 2048;      // packed examples per forward pass
  int64_t head_rows = 256;          // positions per product with the output head
};

// NOT_FOUND for an example that the cache does not hold; INVALID_ARGUMENT for none, for a vocabulary smaller than the cache's
// ids, or for rows that do not match the answer. Throws CancelledException, and NumericException on NaN.
StatusOr<KlResult> KlToTeacher(const model::CausalLm& model, const std::vector<data::EncodedExample>& examples,
                               const distill::LogitCache& teacher, runtime::Reporter& reporter,
                               const KlOptions& options = {});

// KL of each row: logits [n, V] any float dtype, teacher rows for the same n positions -> [n] float64.
at::Tensor KlRows(const at::Tensor& logits, const distill::TeacherRows& teacher);

}  // namespace refinery::eval
