#include "worker/task/runtime/torch.h"

#include "worker/task/quantize/prepared_hessian.h"

#include <algorithm>
#include <numeric>

#include "common/status.h"
#include "worker/task/quantize/grid.h"
#include "worker/task/runtime/reporter.h"

namespace refinery::quantize {
namespace {

constexpr double kSmallestRaisedDamp = 1e-3;
constexpr double kLargestDamp = 1024;       // by then the Hessian is its diagonal in all but name
constexpr int64_t kFloat64Columns = 4096;   // larger factorisations run in float32
constexpr int64_t kErrorColumns = 256;      // of one product in RowErrors

// U with H^-1 = U^T U, upper triangular. With J the reversal, J H J = L L^T gives U = J L^-1 J: one factorisation and one
// triangular inverse instead of the paper's inverse and second Cholesky, and more accurate. Undefined if H is not positive
// definite.
at::Tensor InverseFactor(const at::Tensor& hessian, double damp) {
  const int64_t n = hessian.size(0);
  const at::ScalarType type = n <= kFloat64Columns ? at::kDouble : at::kFloat;
  at::Tensor damped = hessian.to(type).flip({0, 1}).contiguous();
  damped.diagonal().add_(damp);
  auto [lower, info] = at::linalg_cholesky_ex(damped);
  if (info.item<int32_t>() != 0) return {};
  const at::Tensor identity = at::eye(n, at::TensorOptions().dtype(type).device(hessian.device()));
  const at::Tensor inverse = at::linalg_solve_triangular(lower, identity, /*upper=*/false);
  const at::Tensor factor = inverse.flip({0, 1}).to(at::kFloat).contiguous();
  if (!at::isfinite(factor).all().item<bool>() || !(factor.diagonal().min().item<float>() > 0)) return {};
  return factor;
}

// Raises the damping until the factorisation succeeds; undefined if it never does.
at::Tensor DampedFactor(const at::Tensor& hessian, double damp_fraction, PreparedHessian* prepared) {
  for (double damp = damp_fraction; damp <= kLargestDamp; damp = std::max(2 * damp, kSmallestRaisedDamp)) {
    at::Tensor factor = InverseFactor(hessian, damp);
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

ColumnOrder MakeColumnOrder(int64_t columns, int64_t group_size, const float* diagonal) {
  ColumnOrder order;
  const int64_t groups = (columns + group_size - 1) / group_size;
  std::vector<std::vector<int64_t>> members(groups);
  for (int64_t g = 0; g < groups; ++g) {
    members[g].resize(std::min(group_size, columns - g * group_size));
    std::iota(members[g].begin(), members[g].end(), g * group_size);
    if (diagonal == nullptr) continue;
    std::stable_sort(members[g].begin(), members[g].end(), [&](int64_t a, int64_t b) { return diagonal[a] > diagonal[b]; });
  }
  if (diagonal != nullptr) {
    std::stable_sort(members.begin(), members.end(),
                     [&](const auto& a, const auto& b) { return diagonal[a[0]] > diagonal[b[0]]; });
  }
  int64_t block_begin = 0;
  const auto close_block = [&](int64_t end) {
    if (end > block_begin) order.blocks.emplace_back(block_begin, end);
    block_begin = end;
  };
  for (const auto& group : members) {
    const int64_t begin = static_cast<int64_t>(order.columns.size());
    const int64_t size = static_cast<int64_t>(group.size());
    if (begin + size - block_begin > kMaxBlock) close_block(begin);
    for (int64_t i = 0; i < size; ++i) {
      if (i > 0 && begin + i - block_begin == kMaxBlock) close_block(begin + i);
      order.columns.push_back(group[i]);
      order.group_of.push_back(group[i] / group_size);
      order.fit_columns.push_back(i == 0 ? size : 0);
    }
    if (size > kMaxBlock) close_block(begin + size);
  }
  close_block(columns);
  return order;
}

void CheckFinite(const std::string& name, const std::string& what, const at::Tensor& matrix) {
  const at::Tensor finite = at::isfinite(matrix);
  if (finite.all().item<bool>()) return;
  const int64_t bad = at::logical_not(finite).flatten().to(at::kByte).argmax().item<int64_t>();
  throw runtime::NumericException(Join(name, ": ", what, " is not finite at row ", bad / matrix.size(1), ", column ",
                                       bad % matrix.size(1), " (", matrix.flatten()[bad].item<double>(), ")"));
}

at::Tensor PreparedHessian::RowErrors(const at::Tensor& difference) const {
  at::Tensor sums = at::zeros({difference.size(0)}, at::kDouble);
  for (int64_t c = 0; c < half.size(0); c += kErrorColumns) {
    const int64_t end = std::min(c + kErrorColumns, half.size(0));
    const at::Tensor part = at::mm(difference.slice(1, 0, end), half.slice(0, 0, end).slice(1, c, end));
    sums += (part * difference.slice(1, c, end)).sum(1, false, at::kDouble);
  }
  return sums;
}

PreparedHessian PrepareHessian(const std::string& name, const at::Tensor& hessian, const GptqSettings& settings) {
  TORCH_CHECK(hessian.dim() == 2 && hessian.size(0) == hessian.size(1), name, ": Hessian ", hessian.sizes(), " is not square");
  const at::NoGradGuard no_grad;
  const int64_t columns = hessian.size(0);
  at::Tensor h = hessian.detach().to(at::kFloat);
  CheckFinite(name, "Hessian of the calibration inputs", h);
  at::Tensor diagonal = h.diagonal().cpu().contiguous();
  const at::Tensor dead = diagonal.le(0);
  PreparedHessian prepared{.group_size = ResolveGroupSize(settings.group_size, columns), .damp_fraction = settings.damp_fraction,
                           .dead_columns = dead.sum().item<int64_t>()};
  // Divided by the mean of the live diagonal: damping is then a plain number, and no factor of H can over- or underflow.
  const int64_t live = columns - prepared.dead_columns;
  const double mean = live == 0 ? 1.0 : diagonal.to(at::kDouble).sum().item<double>() / static_cast<double>(live);
  h = h / mean;
  prepared.half = (h.triu() + h.triu(1)).cpu();
  // Nothing is known about columns whose input was always zero and nothing depends on them, so they are rounded to nearest;
  // a diagonal entry of one keeps the matrix positive definite.
  diagonal = (diagonal / mean).masked_fill_(dead, 1.0);
  h.diagonal().copy_(diagonal);
  prepared.order = MakeColumnOrder(columns, prepared.group_size, settings.order != ColumnOrderKind::kNatural ? diagonal.const_data_ptr<float>() : nullptr);
  if (live == 0) {
    prepared.notes.push_back("all calibration inputs are zero: rounded to nearest");
    return prepared;
  }
  const at::Tensor index = at::tensor(prepared.order.columns, at::kLong);
  const at::Tensor device_index = index.to(h.device());
  prepared.factor = DampedFactor(h.index_select(0, device_index).index_select(1, device_index), settings.damp_fraction, &prepared);
  if (prepared.factor.defined()) prepared.factor = prepared.factor.cpu();
  prepared.grid_weights = diagonal.index_select(0, index).add_(prepared.damp_fraction).contiguous();
  return prepared;
}

}  // namespace refinery::quantize
