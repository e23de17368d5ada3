#include "worker/task/runtime/torch.h"

#include "worker/task/distill/kd_loss.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "worker/task/distill/kd_row.h"
#include "worker/task/distill/tail_grid.h"

namespace refinery::distill {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

// Weights that do not depend on the row.
struct Weights {
  double kl = 0;             // kl_weight T^2 / normalizer
  double cross_entropy = 0;  // (1 - kl_weight) / normalizer
  double temperature = 1;
  bool gradient = false;
};

struct Sums {
  double kl = 0;
  double cross_entropy = 0;
};

// Hands a gradient that the forward pass has already computed to autograd.
class PrecomputedGradient : public torch::autograd::Function<PrecomputedGradient> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& hidden, const at::Tensor& loss,
                            const at::Tensor& gradient) {
    (void)hidden;  // only its place in the graph matters
    context->save_for_backward({gradient});
    return loss.clone();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& outputs) {
    const at::Tensor gradient = context->get_saved_variables()[0];
    return {gradient * outputs[0].to(gradient.scalar_type()), at::Tensor(), at::Tensor()};
  }
};

void CheckShapes(const at::Tensor& hidden, const at::Tensor& lm_head, const at::Tensor& targets,
                 const TeacherRows& teacher, const KdSettings& settings) {
  TORCH_CHECK(hidden.dim() == 2 && lm_head.dim() == 2 && hidden.size(1) == lm_head.size(1),
              "KdLoss: hidden ", hidden.sizes(), " does not fit the head ", lm_head.sizes());
  const int64_t n = hidden.size(0);
  const int64_t vocabulary = lm_head.size(0);
  TORCH_CHECK(targets.dim() == 1 && targets.size(0) == n, "KdLoss: ", n, " positions but targets ", targets.sizes());
  TORCH_CHECK(targets.scalar_type() == at::kLong, "KdLoss: targets must be int64");
  TORCH_CHECK(settings.temperature > 0 && settings.chunk > 0, "KdLoss: temperature and chunk must be positive");
  TORCH_CHECK(settings.kl_weight >= 0 && settings.kl_weight <= 1, "KdLoss: kl_weight outside [0, 1]");
  TORCH_CHECK(teacher.ids.defined() || settings.kl_weight == 0, "KdLoss: kl_weight > 0 needs a teacher");
  const auto inside = [vocabulary](const at::Tensor& ids) {
    return ids.numel() == 0 || (ids.min().item<int64_t>() >= 0 && ids.max().item<int64_t>() < vocabulary);
  };
  TORCH_CHECK(inside(targets), "KdLoss: a target lies outside the vocabulary of ", vocabulary);
  if (!teacher.ids.defined()) return;
  TORCH_CHECK(teacher.ids.dim() == 2 && teacher.ids.size(0) == n && teacher.ids.size(1) >= 1 &&
                  teacher.ids.size(1) <= vocabulary && teacher.logits.sizes() == teacher.ids.sizes(),
              "KdLoss: teacher ids ", teacher.ids.sizes(), " for ", n, " positions");
  TORCH_CHECK(teacher.tail_logits.dim() == 1 && teacher.tail_logits.size(0) == n, "KdLoss: tail_logits must be [n]");
  TORCH_CHECK(inside(teacher.ids), "KdLoss: a teacher id lies outside the vocabulary of ", vocabulary);
}

// A teacher's rows as the kernels take them: contiguous, on the student's device, the tail at the loss's temperature.
struct PreparedTeacher {
  at::Tensor ids;     // [n, K] int32; undefined without a teacher
  at::Tensor logits;  // [n, K] float32, at temperature 1
  at::Tensor tails;   // [n] float64
};

// The fused kernel over the rows of one chunk. logits [c, V] become the gradient where one is wanted.
template <typename T>
void RunRows(T* logits, int64_t rows, int64_t vocabulary, const PreparedTeacher& teacher, const int64_t* targets,
             const Weights& weights, std::vector<RowResult>* results) {
  const int64_t entries = teacher.ids.defined() ? teacher.ids.size(1) : 0;
  const RowSettings settings{.vocabulary = vocabulary,
                             .temperature = weights.temperature,
                             .kl_weight = weights.kl,
                             .cross_entropy_weight = weights.cross_entropy,
                             .gradient = weights.gradient};
  const int32_t* ids = entries > 0 ? teacher.ids.const_data_ptr<int32_t>() : nullptr;
  const float* entry_logits = entries > 0 ? teacher.logits.const_data_ptr<float>() : nullptr;
  const double* tails = entries > 0 ? teacher.tails.const_data_ptr<double>() : nullptr;
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(vocabulary));
    std::vector<double> teacher_scratch(static_cast<size_t>(2 * entries));
    for (int64_t i = begin; i < end; ++i) {
      TeacherRow row{.entries = entries};
      if (entries > 0) row = {ids + i * entries, entry_logits + i * entries, tails[i], entries};
      (*results)[static_cast<size_t>(i)] =
          KdRow(logits + i * vocabulary, row, static_cast<int32_t>(targets[i]), settings, scratch.data(),
                teacher_scratch.data());
    }
  });
}

Sums FusedChunk(const at::Tensor& logits, const PreparedTeacher& teacher, const at::Tensor& targets,
                const Weights& weights) {
  std::vector<RowResult> results(static_cast<size_t>(logits.size(0)));
  const int64_t* target = targets.const_data_ptr<int64_t>();
  if (logits.scalar_type() == at::kBFloat16) {
    auto* bits = reinterpret_cast<uint16_t*>(logits.mutable_data_ptr<at::BFloat16>());
    RunRows(bits, logits.size(0), logits.size(1), teacher, target, weights, &results);
  } else {
    RunRows(logits.mutable_data_ptr<float>(), logits.size(0), logits.size(1), teacher, target, weights, &results);
  }
  Sums sums;
  for (const RowResult& result : results) {
    sums.kl += result.kl;
    sums.cross_entropy += result.cross_entropy;
  }
  return sums;
}

// p log(p/q) - p + q per bucket; see Divergence in kd_row.cc.
at::Tensor Divergence(const at::Tensor& log_p, const at::Tensor& log_q) {
  const at::Tensor d = log_q - log_p;
  const at::Tensor value = at::exp(log_p) * (at::expm1(d) - d).clamp_min(0);
  return at::where(at::isneginf(log_p), at::exp(log_q), value);
}

// The same steps as KdRow in ATen operators, for devices and dtypes without the kernel. Softmax in float32 or float64.
Sums DenseChunk(const at::Tensor& logits, const PreparedTeacher& teacher, const at::Tensor& targets,
                const Weights& weights) {
  const at::ScalarType type = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor plain = logits.to(type);
  const at::Tensor column = targets.unsqueeze(1);
  at::Tensor gradient = at::zeros_like(plain);
  const at::Tensor log_softmax = plain.log_softmax(1);
  Sums sums{.cross_entropy = -log_softmax.gather(1, column).sum(at::kDouble).item<double>()};
  if (weights.cross_entropy != 0) {
    gradient.add_(log_softmax.exp(), weights.cross_entropy);
    gradient.scatter_add_(1, column, at::full(column.sizes(), -weights.cross_entropy, plain.options()));
  }
  if (teacher.ids.defined()) {
    const at::Tensor ids = teacher.ids.to(at::kLong);
    const bool has_rest = logits.size(1) > ids.size(1);
    const at::Tensor tail = teacher.tails.to(type).unsqueeze(1);
    const at::Tensor log_p = at::cat({teacher.logits.to(type) / weights.temperature, tail}, 1).log_softmax(1);
    const at::Tensor log_q_all = (plain / weights.temperature).log_softmax(1);
    const at::Tensor log_q_rest = log_q_all.scatter(1, ids, kMinusInfinity);
    const at::Tensor log_q_tail = has_rest ? log_q_rest.logsumexp(1, true).clamp_min(-85) : tail;
    const at::Tensor log_q = at::cat({log_q_all.gather(1, ids), log_q_tail}, 1);
    sums.kl = Divergence(log_p, log_q).sum(at::kDouble).item<double>();
    const int64_t entries = ids.size(1);
    const at::Tensor log_p_tail = log_p.narrow(1, entries, 1);
    const at::Tensor ratio = has_rest ? at::exp(log_p_tail - log_q_tail) : at::zeros_like(log_p_tail);
    const at::Tensor entries_gradient = log_q.narrow(1, 0, entries).exp() - log_p.narrow(1, 0, entries).exp();
    const at::Tensor kl_gradient = (log_q_rest.exp() * (1 - ratio)).scatter(1, ids, entries_gradient);
    gradient.add_(kl_gradient, weights.kl / weights.temperature);
  }
  if (weights.gradient) logits.copy_(gradient);
  return sums;
}

PreparedTeacher Prepare(const TeacherRows& teacher, int64_t vocabulary, double temperature, const at::Device& device) {
  if (!teacher.ids.defined()) return {};
  at::Tensor tails = TailAtTemperature(teacher.tail_logits, teacher.tail_log_partitions, temperature);
  if (teacher.ids.size(1) == vocabulary) tails = at::full_like(tails, kMinusInfinity);
  return {teacher.ids.to(device, at::kInt).contiguous(), teacher.logits.to(device, at::kFloat).contiguous(),
          tails.to(device).contiguous()};
}

}  // namespace

KdResult KdLoss(const at::Tensor& hidden, const at::Tensor& lm_head, const at::Tensor& targets,
                const TeacherRows& teacher, const KdSettings& settings, int64_t normalizer) {
  CheckShapes(hidden, lm_head, targets, teacher, settings);
  const bool wants_gradient = at::GradMode::is_enabled() && hidden.requires_grad();
  Sums sums;
  at::Tensor gradient;
  const int64_t n = hidden.size(0);
  const double divisor = static_cast<double>(std::max<int64_t>(1, normalizer > 0 ? normalizer : n));
  const double kl_scale = settings.kl_weight * settings.temperature * settings.temperature;
  {
    const at::NoGradGuard no_grad;
    const at::Tensor states = hidden.detach();
    const at::Tensor head = lm_head.detach();
    const PreparedTeacher rows = Prepare(teacher, head.size(0), settings.temperature, hidden.device());
    const at::Tensor wanted = targets.to(hidden.device()).contiguous();
    const Weights weights{.kl = kl_scale / divisor,
                          .cross_entropy = (1 - settings.kl_weight) / divisor,
                          .temperature = settings.temperature,
                          .gradient = wants_gradient};
    const bool fused = hidden.is_cpu() && (hidden.scalar_type() == at::kBFloat16 || hidden.scalar_type() == at::kFloat);
    if (wants_gradient) gradient = at::empty(states.sizes(), states.options());
    at::Tensor buffer = at::empty({std::min(n, settings.chunk), head.size(0)}, states.options());
    for (int64_t begin = 0; begin < n; begin += settings.chunk) {
      const int64_t count = std::min(settings.chunk, n - begin);
      at::Tensor logits = buffer.narrow(0, 0, count);
      at::mm_out(logits, states.narrow(0, begin, count), head.t());
      PreparedTeacher part;
      if (rows.ids.defined()) {
        part = {rows.ids.narrow(0, begin, count), rows.logits.narrow(0, begin, count),
                rows.tails.narrow(0, begin, count)};
      }
      const at::Tensor part_targets = wanted.narrow(0, begin, count);
      const Sums chunk = fused ? FusedChunk(logits, part, part_targets, weights)
                               : DenseChunk(logits, part, part_targets, weights);
      sums.kl += chunk.kl;
      sums.cross_entropy += chunk.cross_entropy;
      at::Tensor out = wants_gradient ? gradient.narrow(0, begin, count) : at::Tensor();
      if (wants_gradient) at::mm_out(out, logits, head);
    }
  }
  KdResult result{.kl = sums.kl / divisor, .cross_entropy = sums.cross_entropy / divisor};
  const double value = kl_scale * result.kl + (1 - settings.kl_weight) * result.cross_entropy;
  const at::ScalarType type = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  result.loss = at::scalar_tensor(value, at::TensorOptions().dtype(type).device(hidden.device()));
  if (wants_gradient) result.loss = PrecomputedGradient::apply(hidden, result.loss, gradient);
  return result;
}

}  // namespace refinery::distill
