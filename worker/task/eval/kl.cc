#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <cmath>
#include <numeric>

#include "worker/task/eval/kl.h"

namespace refinery::eval {
namespace {

struct Sums {
  double kl = 0;
  int64_t agreeing = 0;
};

// One example: its final hidden states at the positions that predict the answer, [n, H].
Sums SumExample(const model::CausalLm& model, const at::Tensor& hidden, const distill::TeacherRows& teacher,
                int64_t head_rows) {
  Sums sums;
  for (int64_t begin = 0; begin < hidden.size(0); begin += head_rows) {
    const int64_t rows = std::min(head_rows, hidden.size(0) - begin);
    const at::Tensor logits = model.Logits(hidden.narrow(0, begin, rows));
    const distill::TeacherRows part{teacher.ids.narrow(0, begin, rows), teacher.logits.narrow(0, begin, rows),
                                    teacher.tail_logits.narrow(0, begin, rows)};
    sums.kl += KlRows(logits, part).sum().item<double>();
    const at::Tensor first = part.ids.select(1, 0).to(logits.device(), at::kLong);
    sums.agreeing += logits.argmax(1).eq(first).sum().item<int64_t>();
  }
  return sums;
}

Status CheckRows(const data::EncodedExample& example, const distill::TeacherRows& rows, int64_t vocabulary) {
  const int64_t answer = static_cast<int64_t>(example.tokens.size()) - example.answer_begin;
  if (example.answer_begin < 1 || answer < 1) return InvalidArgument("an example needs a prompt and an answer");
  if (rows.ids.size(0) != answer) {
    return InvalidArgument("the logit cache holds ", rows.ids.size(0), " rows for an answer of ", answer, " tokens");
  }
  if (rows.ids.max().item<int64_t>() >= vocabulary) {
    return InvalidArgument("the logit cache names token ", rows.ids.max().item<int64_t>(), ", the model's vocabulary has ",
                           vocabulary, ": teacher and student need one tokenizer");
  }
  return absl::OkStatus();
}

}  // namespace

at::Tensor KlRows(const at::Tensor& logits, const distill::TeacherRows& teacher) {
  const at::Device device = logits.device();
  const at::Tensor full = logits.to(at::kFloat);
  const at::Tensor student =
      (full.gather(1, teacher.ids.to(device, at::kLong)) - full.logsumexp(1, /*keepdim=*/true)).to(at::kDouble);
  const at::Tensor log_p = teacher.logits.to(device, at::kDouble);
  const at::Tensor tail_log_p = teacher.tail_logits.to(device, at::kDouble);
  const at::Tensor head = (log_p.exp() * (log_p - student)).sum(1);
  // The student's mass outside the entries; rounding may bring it to nothing or below.
  const at::Tensor tail_log_q = at::log1p(-student.exp().sum(1).clamp_max(1 - 1e-12));
  const at::Tensor tail = tail_log_p.exp() * (tail_log_p - tail_log_q);
  return head + at::where(at::isinf(tail_log_p), at::zeros_like(tail), tail);
}

StatusOr<KlResult> KlToTeacher(const model::CausalLm& model, const std::vector<data::EncodedExample>& examples,
                               const distill::LogitCache& teacher, runtime::Reporter& reporter, const KlOptions& options) {
  if (examples.empty()) return InvalidArgument("no held-out examples to compare with the teacher");
  const at::NoGradGuard no_grad;
  KlResult result{.examples = static_cast<int64_t>(examples.size())};
  double total = 0;
  int64_t agreeing = 0;
  for (size_t begin = 0, end = 0; begin < examples.size(); begin = end) {
    reporter.Check();
    model::PackedBatch batch;
    std::vector<int64_t> ids;
    for (end = begin; end < examples.size(); ++end) {
      const std::vector<int32_t>& tokens = examples[end].tokens;
      if (!ids.empty() && static_cast<int64_t>(ids.size() + tokens.size()) > options.batch_tokens) break;
      ids.insert(ids.end(), tokens.begin(), tokens.end());
      batch.lengths.push_back(static_cast<int64_t>(tokens.size()));
    }
    batch.token_ids = at::tensor(ids, at::kLong);
    const at::Tensor hidden = model.Hidden(batch);
    int64_t offset = 0;
    for (size_t i = begin; i < end; ++i) {
      const int64_t length = batch.lengths[i - begin];
      RF_ASSIGN_OR_RETURN(const distill::TeacherRows rows, teacher.Get(examples[i].key));
      RF_RETURN_IF_ERROR(CheckRows(examples[i], rows, model.config().vocab_size));
      const int64_t answer = length - examples[i].answer_begin;
      const Sums sums =
          SumExample(model, hidden.narrow(0, offset + examples[i].answer_begin - 1, answer), rows, options.head_rows);
      if (!std::isfinite(sums.kl)) throw runtime::NumericException(Join("KL of held-out example ", i, " is not finite"));
      result.per_example.push_back(sums.kl / static_cast<double>(answer));
      result.tokens += answer;
      total += sums.kl;
      agreeing += sums.agreeing;
      offset += length;
    }
    reporter.Report({.phase = "divergence from the teacher", .done = static_cast<double>(end),
                     .total = static_cast<double>(examples.size())});
  }
  const double n = static_cast<double>(result.examples);
  result.mean = std::accumulate(result.per_example.begin(), result.per_example.end(), 0.0) / n;
  result.token_mean = total / static_cast<double>(result.tokens);
  result.top1_agreement = static_cast<double>(agreeing) / static_cast<double>(result.tokens);
  if (result.examples > 1) {
    double squares = 0;
    for (const double value : result.per_example) squares += (value - result.mean) * (value - result.mean);
    result.standard_error = std::sqrt(squares / (n - 1) / n);
  }
  return result;
}

}  // namespace refinery::eval
