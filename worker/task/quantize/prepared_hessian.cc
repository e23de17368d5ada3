#include "worker/task/runtime/torch.h"

#include "worker/task/quantize/prepared_hessian.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "common/status.h"
#include "worker/task/quantize/grid.h"
#include "worker/task/quantize/lane_product.h"
#include "worker/task/runtime/reporter.h"

namespace refinery::quantize {
namespace {

constexpr double kSmallestRaisedDamp = 1e-3;
constexpr double kLargestDamp = 1024;       // by then the Hessian is its diagonal in all but name
constexpr int64_t kFloat64Columns = 4096;   // larger factorisations run in float32
constexpr int64_t kErrorColumns = 128;      // of one product in RowErrors
constexpr int64_t kSmallInverse = 192;      // columns

// L^-1 of a lower triangular L, by halves: [A 0; B C]^-1 = [A^-1 0; -C^-1 B A^-1 C^-1]. Half the work of solving for the identity.
void InvertLower(const at::Tensor& lower, at::Tensor out) {
  const int64_t n = lower.size(0);
  if (n <= kSmallInverse) {
    out.copy_(at::linalg_solve_triangular(lower, at::eye(n, lower.options()), /*upper=*/false));
    return;
  }
  const int64_t half = n / 2;
  const at::Tensor top = out.slice(0, 0, half).slice(1, 0, half), bottom = out.slice(0, half).slice(1, half);
  InvertLower(lower.slice(0, 0, half).slice(1, 0, half), top);
  InvertLower(lower.slice(0, half).slice(1, half), bottom);
  out.slice(0, 0, half).slice(1, half).zero_();
  out.slice(0, half).slice(1, 0, half).copy_(at::mm(bottom, at::mm(lower.slice(0, half).slice(1, 0, half), top)).neg_());
}

// target[i][j] = source[index[i]][index[j]], in one pass.
template <typename T>
at::Tensor Permuted(const at::Tensor& source, const std::vector<int64_t>& index) {
  const int64_t n = source.size(0);
  at::Tensor target = at::empty({n, n}, c10::CppTypeToScalarType<T>::value);
  const float* from = source.const_data_ptr<float>();
  T* to = target.data_ptr<T>();
  at::parallel_for(0, n, 32, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* row = from + index[i] * n;
      for (int64_t j = 0; j < n; ++j) to[i * n + j] = static_cast<T>(row[index[j]]);
    }
  });
  return target;
}

// The upper triangle of J M J for a lower triangular M, J the reversal; float32.
template <typename T>
at::Tensor Reversed(const at::Tensor& lower) {
  const int64_t n = lower.size(0);
  at::Tensor target = at::zeros({n, n}, at::kFloat);
  const T* from = lower.const_data_ptr<T>();
  float* to = target.data_ptr<float>();
  at::parallel_for(0, n, 32, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* row = from + (n - 1 - i) * n;
      for (int64_t j = i; j < n; ++j) to[i * n + j] = static_cast<float>(row[n - 1 - j]);
    }
  });
  return target;
}

// U with H^-1 = U^T U, upper triangular. With J the reversal, J H J = L L^T gives U = J L^-1 J: one factorisation and one
// triangular inverse instead of the paper's inverse and second Cholesky, and more accurate. `backwards` is the processing order
// from its end. Undefined if the damped H is not positive definite.
template <typename T>
at::Tensor InverseFactor(const at::Tensor& hessian, const std::vector<int64_t>& backwards, double damp) {
  at::Tensor damped = Permuted<T>(hessian, backwards);
  damped.diagonal().add_(damp);
  auto [lower, info] = at::linalg_cholesky_ex(damped);
  if (info.template item<int32_t>() != 0) return {};
  InvertLower(lower, damped);
  const at::Tensor factor = Reversed<T>(damped);
  if (!std::isfinite(factor.sum().item<float>()) || !(factor.diagonal().min().item<float>() > 0)) return {};
  return factor;
}

// Raises the damping until the factorisation succeeds; undefined if it never does.
at::Tensor DampedFactor(const at::Tensor& hessian, const ColumnOrder& order, double damp_fraction, PreparedHessian* prepared) {
  const std::vector<int64_t> backwards(order.columns.rbegin(), order.columns.rend());
  for (double damp = damp_fraction; damp <= kLargestDamp; damp = std::max(2 * damp, kSmallestRaisedDamp)) {
    at::Tensor factor = hessian.size(0) <= kFloat64Columns ? InverseFactor<double>(hessian, backwards, damp)
                                                           : InverseFactor<float>(hessian, backwards, damp);
    if (!factor.defined()) continue;
    prepared->damp_fraction = damp;
    if (damp != damp_fraction) prepared->notes.push_back(Join("damp_fraction raised from ", damp_fraction, " to ", damp));
    return factor;
  }
  prepared->notes.push_back("the Hessian could not be factorised at any damping: rounded to nearest");
  return {};
}

}  // namespace

int64_t ResolveGroupSize(int64_t group_size, int64_t columns) {
  return group_size <= 0 ? columns : std::min(group_size, columns);
}

ColumnOrder MakeColumnOrder(int64_t columns, int64_t group_size, ColumnOrderKind kind, const float* diagonal) {
  ColumnOrder order{.natural_groups = kind != ColumnOrderKind::kClassic};
  const auto larger = [&](int64_t a, int64_t b) { return diagonal[a] > diagonal[b]; };
  std::vector<int64_t> all(columns);
  std::iota(all.begin(), all.end(), 0);
  if (kind == ColumnOrderKind::kClassic) std::stable_sort(all.begin(), all.end(), larger);
  const int64_t groups = (columns + group_size - 1) / group_size;
  std::vector<std::pair<int64_t, std::vector<int64_t>>> members(groups);  // the group's number and its columns
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * group_size, end = std::min(begin + group_size, columns);
    members[g] = {g, std::vector<int64_t>(all.begin() + begin, all.begin() + end)};
    if (kind == ColumnOrderKind::kGroups) std::stable_sort(members[g].second.begin(), members[g].second.end(), larger);
  }
  if (kind == ColumnOrderKind::kGroups) {
    std::stable_sort(members.begin(), members.end(),
                     [&](const auto& a, const auto& b) { return larger(a.second[0], b.second[0]); });
  }
  int64_t block_begin = 0;
  const auto close_block = [&](int64_t end) {
    if (end > block_begin) order.blocks.emplace_back(block_begin, end);
    block_begin = end;
  };
  for (const auto& [number, group] : members) {
    const int64_t begin = static_cast<int64_t>(order.columns.size());
    const int64_t size = static_cast<int64_t>(group.size());
    if (begin + size - block_begin > kMaxBlock) close_block(begin);
    for (int64_t i = 0; i < size; ++i) {
      if (i > 0 && begin + i - block_begin == kMaxBlock) close_block(begin + i);
      order.columns.push_back(group[i]);
      order.group_of.push_back(number);
      order.fit_columns.push_back(i == 0 ? size : 0);
    }
    if (size > kMaxBlock) close_block(begin + size);
  }
  close_block(columns);
  return order;
}

void CheckFinite(const std::string& name, const std::string& what, const at::Tensor& matrix) {
  if (std::isfinite(matrix.sum().item<double>())) return;  // the common case in one pass; a sum may also overflow
  const at::Tensor finite = at::isfinite(matrix);
  if (finite.all().item<bool>()) return;
  const int64_t bad = at::logical_not(finite).flatten().to(at::kByte).argmax().item<int64_t>();
  throw runtime::NumericException(Join(name, ": ", what, " is not finite at row ", bad / matrix.size(1), ", column ",
                                       bad % matrix.size(1), " (", matrix.flatten()[bad].item<double>(), ")"));
}

at::Tensor PreparedHessian::RowErrors(const at::Tensor& difference) const {
  const int64_t columns = matrix.size(0), rows = difference.size(1);
  const at::Tensor e = difference.contiguous();
  const float* errors = e.const_data_ptr<float>();
  at::Tensor sums = at::zeros({rows}, at::kDouble), part = at::empty({kErrorColumns, rows}, at::kFloat);
  for (int64_t c = 0; c < columns; c += kErrorColumns) {  // what lies beside the diagonal block counts twice; H is symmetric
    const int64_t end = std::min(c + kErrorColumns, columns);
    LaneProduct product{.a = matrix.const_data_ptr<float>() + end * columns + c, .a_stride = columns, .b = errors + end * rows,
                        .out = part.data_ptr<float>(), .rows = rows, .depth = columns - end, .width = end - c, .factor = 2};
    Multiply(product);
    product.a -= (end - c) * columns;
    product.b -= (end - c) * rows;
    product.depth = end - c;
    product.factor = 1;
    product.add = true;
    Multiply(product);
    at::Tensor used = part.slice(0, 0, end - c);
    sums += used.mul_(e.slice(0, c, end)).sum(0, false, at::kDouble);
  }
  return sums;
}

PreparedHessian PrepareHessian(const std::string& name, const at::Tensor& hessian, const GptqSettings& settings,
                               const at::Tensor& cross) {
  TORCH_CHECK(hessian.dim() == 2 && hessian.size(0) == hessian.size(1), name, ": Hessian ", hessian.sizes(), " is not square");
  const at::NoGradGuard no_grad;
  const int64_t columns = hessian.size(0);
  at::Tensor h = hessian.detach().cpu().to(at::kFloat).contiguous();
  CheckFinite(name, "Hessian of the calibration inputs", h);
  at::Tensor diagonal = h.diagonal().contiguous();
  const at::Tensor dead = diagonal.le(0);
  PreparedHessian prepared{.group_size = ResolveGroupSize(settings.group_size, columns), .damp_fraction = settings.damp_fraction,
                           .dead_columns = dead.sum().item<int64_t>()};
  // Divided by the mean of the live diagonal: damping is then a plain number, and no factor of H can over- or underflow.
  const int64_t live = columns - prepared.dead_columns;
  const double mean = live == 0 ? 1.0 : diagonal.to(at::kDouble).sum().item<double>() / static_cast<double>(live);
  h = h / mean;
  // Nothing is known about columns whose input was always zero and nothing depends on them, so they are rounded to nearest;
  // a diagonal entry of one keeps the matrix positive definite.
  diagonal = (diagonal / mean).masked_fill_(dead, 1.0);
  prepared.order = MakeColumnOrder(columns, prepared.group_size, settings.order, diagonal.const_data_ptr<float>());
  prepared.matrix = Permuted<float>(h, prepared.order.columns);
  if (live == 0) {
    prepared.notes.push_back("all calibration inputs are zero: rounded to nearest");
    return prepared;
  }
  h.diagonal().copy_(diagonal);
  prepared.factor = DampedFactor(h, prepared.order, settings.damp_fraction, &prepared);
  if (!prepared.factor.defined()) return prepared;
  prepared.grid_weights = prepared.factor.diagonal().square().reciprocal_();
  if (cross.defined()) {
    TORCH_CHECK(cross.sizes() == hessian.sizes(), name, ": a cross matrix ", cross.sizes(), " beside a Hessian ", hessian.sizes());
    CheckFinite(name, "cross matrix of the calibration inputs", cross);
    prepared.cross = Permuted<float>((cross.detach().cpu().to(at::kFloat) / mean).contiguous(), prepared.order.columns);
  }
  return prepared;
}

}  // namespace refinery::quantize
