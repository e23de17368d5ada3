#include "worker/task/runtime/torch.h"

#include "worker/task/recover/divergence.h"

#include <algorithm>
#include <vector>

#include "worker/task/model/matmul.h"
#include "worker/task/model/ops.h"
#include "worker/task/recover/row_kernels.h"

namespace refinery::recover {
namespace {

// Student logits become the gradient where `factor` is not 0.
template <typename T>
double FusedRows(const at::Tensor& teacher, const at::Tensor& student, float factor) {
  const int64_t rows = student.size(0), vocabulary = student.size(1);
  const T* of_teacher = static_cast<const T*>(teacher.const_data_ptr());
  T* of_student = static_cast<T*>(student.mutable_data_ptr());
  std::vector<double> values(static_cast<size_t>(rows));
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(2 * vocabulary));
    for (int64_t r = begin; r < end; ++r) {
      values[static_cast<size_t>(r)] =
          DivergenceRow<T>(of_teacher + r * vocabulary, of_student + r * vocabulary, vocabulary, factor, scratch.data());
    }
  });
  double sum = 0;
  for (const double value : values) sum += value;
  return sum;
}

// The same in ATen operators, for devices and dtypes without the kernel.
double DenseRows(const at::Tensor& teacher, const at::Tensor& student, double factor) {
  const at::ScalarType type = student.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor log_p = teacher.to(type).log_softmax(1), log_q = student.to(type).log_softmax(1);
  const double sum = (log_p.exp() * (log_p - log_q)).sum(at::kDouble).item<double>();
  if (factor != 0) student.copy_((log_q.exp() - log_p.exp()) * factor);
  return sum;
}

}  // namespace

Divergence SumDivergence(const at::Tensor& hidden, const at::Tensor& source_hidden, const at::Tensor& head,
                         const DivergenceOptions& options) {
  TORCH_CHECK(hidden.dim() == 2 && hidden.sizes() == source_hidden.sizes() && head.dim() == 2 && head.size(1) == hidden.size(1),
              "SumDivergence: hidden ", hidden.sizes(), ", source ", source_hidden.sizes(), ", head ", head.sizes());
  const at::NoGradGuard no_grad;
  const at::Tensor tuned = hidden.detach(), source = source_hidden.detach();
  const double factor = options.normalizer > 0 ? 1 / options.normalizer : 0;
  const int64_t positions = tuned.size(0), chunk = std::min(std::max<int64_t>(1, positions), options.chunk);
  Divergence result;
  if (factor != 0) result.gradient = at::empty_like(tuned);
  for (int64_t begin = 0; begin < positions; begin += chunk) {
    const int64_t count = std::min(chunk, positions - begin);
    const at::Tensor student_logits = model::Matmul(tuned.narrow(0, begin, count), head, {});
    const at::Tensor teacher_logits = model::Matmul(source.narrow(0, begin, count), head, {});
    if (!model::TakesCpuKernels(student_logits)) {
      result.sum += DenseRows(teacher_logits, student_logits, factor);
    } else if (student_logits.scalar_type() == at::kBFloat16) {
      result.sum += FusedRows<simd::Bf16>(teacher_logits, student_logits, static_cast<float>(factor));
    } else {
      result.sum += FusedRows<float>(teacher_logits, student_logits, static_cast<float>(factor));
    }
    if (factor == 0) continue;
    result.gradient.narrow(0, begin, count).copy_(model::MatmulByInputs(student_logits, head));
  }
  return result;
}

}  // namespace refinery::recover
