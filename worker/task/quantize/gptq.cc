#include "worker/task/runtime/torch.h"

#include "worker/task/quantize/gptq.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "common/status.h"
#include "worker/task/quantize/grid.h"
#include "worker/task/runtime/reporter.h"

namespace refinery::quantize {
namespace {

constexpr double kSmallestRaisedDamp = 1e-3;
constexpr double kLargestDamp = 1024;       // by then the Hessian is its diagonal in all but name
constexpr int64_t kFloat64Columns = 4096;   // larger factorisations run in float32

struct Order {
  std::vector<int64_t> columns;      // processing order -> place in the matrix
  std::vector<int64_t> group_of;     // processing order -> original group
  std::vector<int64_t> fit_columns;  // > 0 where a group starts: its size
  std::vector<std::pair<int64_t, int64_t>> blocks;  // [begin, end) between two lazy updates
};

int64_t ResolveGroupSize(int64_t group_size, int64_t columns) {
  return group_size <= 0 ? columns : std::min(group_size, columns);
}

// Groups by their largest diagonal entry, columns inside a group by their own, both descending and stable: what matters
// most is rounded first, while others can still make up for it. Codes keep their place (GPTQModel's group-aware order).
Order MakeOrder(int64_t columns, int64_t group_size, const float* diagonal) {
  Order order;
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

void CheckSettings(const at::Tensor& weight, const GptqSettings& settings) {
  TORCH_CHECK(weight.dim() == 2, "GPTQ needs a matrix, got ", weight.sizes());
  TORCH_CHECK(settings.bits == 2 || settings.bits == 3 || settings.bits == 4 || settings.bits == 8, "bits must be 2, 3, 4 or 8, not ",
              settings.bits);
  TORCH_CHECK(settings.group_size == -1 || settings.group_size > 0, "group_size must be -1 or positive, not ",
              settings.group_size);
}

// Throws naming the first bad element.
void CheckFinite(const std::string& name, const std::string& what, const at::Tensor& matrix) {
  const at::Tensor finite = at::isfinite(matrix);
  if (finite.all().item<bool>()) return;
  const int64_t bad = at::logical_not(finite).flatten().to(at::kByte).argmax().item<int64_t>();
  throw runtime::NumericException(Join(name, ": ", what, " is not finite at row ", bad / matrix.size(1), ", column ",
                                       bad % matrix.size(1), " (", matrix.flatten()[bad].item<double>(), ")"));
}

// The column loop over all rows. `transposed` is W^T in processing order and is consumed; `factor` U (undefined: plain
// rounding) and `grid_weights` are in processing order too.
QuantizedLinear RunColumns(at::Tensor transposed, const at::Tensor& factor, const at::Tensor& grid_weights, const Order& order,
                           int64_t bits, int64_t group_size) {
  const int64_t columns = transposed.size(0), rows = transposed.size(1);
  const int64_t groups = (columns + group_size - 1) / group_size;
  at::Tensor codes = at::empty({columns, rows}, at::kByte);
  at::Tensor scales = at::empty({groups, rows}, at::kFloat);
  at::Tensor errors = factor.defined() ? at::empty({kMaxBlock, rows}, at::kFloat) : at::Tensor();
  ColumnBlock block{.rows = rows, .bits = bits, .original = order.columns.data(), .group_of = order.group_of.data(),
                    .fit_columns = order.fit_columns.data(),
                    .grid_weights = grid_weights.defined() ? grid_weights.const_data_ptr<float>() : nullptr,
                    .factor = factor.defined() ? factor.const_data_ptr<float>() : nullptr, .factor_stride = columns,
                    .weight = transposed.const_data_ptr<float>(),
                    .errors = errors.defined() ? errors.data_ptr<float>() : nullptr, .codes = codes.data_ptr<uint8_t>(),
                    .scales = scales.data_ptr<float>()};
  const int64_t tiles = (rows + kLanes - 1) / kLanes;
  for (const auto& [begin, end] : order.blocks) {
    block.begin = begin;
    block.end = end;
    at::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
      for (int64_t tile = first; tile < last; ++tile) QuantizeTile(block, tile * kLanes);
    });
    if (factor.defined() && end < columns) {  // W[:, end:] -= E U[begin:end, end:], transposed
      at::Tensor rest = transposed.slice(0, end);
      rest.addmm_(factor.slice(0, begin, end).slice(1, end).t(), errors.slice(0, 0, end - begin), 1, -1);
    }
  }
  return {.codes = codes.t().contiguous(), .scales = scales.t().contiguous().to(at::kHalf), .bits = bits,
          .group_size = group_size};
}

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
at::Tensor DampedFactor(const at::Tensor& hessian, double damp_fraction, GptqReport* report) {
  for (double damp = damp_fraction; damp <= kLargestDamp; damp = std::max(2 * damp, kSmallestRaisedDamp)) {
    at::Tensor factor = InverseFactor(hessian, damp);
    if (!factor.defined()) continue;
    report->damp_fraction = damp;
    if (damp != damp_fraction) report->notes.push_back(Join("damp_fraction raised from ", damp_fraction, " to ", damp));
    return factor;
  }
  report->notes.push_back("the Hessian could not be factorised at any damping: rounded to nearest");
  return {};
}

// (W - Q) H (W - Q)^T for each row, [out] float64.
at::Tensor RowErrors(const at::Tensor& difference, const at::Tensor& hessian) {
  return (at::mm(difference, hessian) * difference).to(at::kDouble).sum(1);
}

}  // namespace

at::Tensor QuantizedLinear::Dequantize() const {
  const int64_t columns = codes.size(1);
  at::Tensor values = codes.to(at::kFloat).sub_(static_cast<double>(int64_t{1} << (bits - 1)));
  const at::Tensor wide = scales.to(at::kFloat).repeat_interleave(group_size, 1);
  return values.mul_(wide.slice(1, 0, columns));
}

QuantizedLinear RoundToNearest(const at::Tensor& weight, const GptqSettings& settings) {
  CheckSettings(weight, settings);
  const at::NoGradGuard no_grad;
  const int64_t group_size = ResolveGroupSize(settings.group_size, weight.size(1));
  const Order order = MakeOrder(weight.size(1), group_size, nullptr);
  return RunColumns(weight.detach().cpu().to(at::kFloat).t().contiguous(), {}, {}, order, settings.bits, group_size);
}

QuantizedLinear Gptq(const std::string& name, const at::Tensor& weight, const at::Tensor& hessian,
                     const GptqSettings& settings, GptqReport* report) {
  CheckSettings(weight, settings);
  const int64_t columns = weight.size(1);
  TORCH_CHECK(hessian.dim() == 2 && hessian.size(0) == columns && hessian.size(1) == columns, name, ": Hessian ",
              hessian.sizes(), " does not fit weight ", weight.sizes());
  const at::NoGradGuard no_grad;
  GptqReport unused;
  if (report == nullptr) report = &unused;
  *report = {};
  report->damp_fraction = settings.damp_fraction;
  const at::Tensor w = weight.detach().to(at::kFloat).cpu();
  at::Tensor h = hessian.detach().to(at::kFloat);
  CheckFinite(name, "weight", w);
  CheckFinite(name, "Hessian of the calibration inputs", h);

  // Columns whose input was always zero: nothing is known about them and nothing depends on them, so they are rounded to
  // nearest; a diagonal entry of one keeps the matrix positive definite.
  at::Tensor diagonal = h.diagonal().cpu().contiguous();
  const at::Tensor dead = diagonal.le(0);
  report->dead_columns = dead.sum().item<int64_t>();
  QuantizedLinear nearest = RoundToNearest(w, settings);
  if (report->dead_columns == columns) {
    report->notes.push_back("all calibration inputs are zero: rounded to nearest");
    return nearest;
  }
  // Divided by the mean of the live diagonal: damping is then a plain number, and no factor of H can over- or underflow.
  const double mean = diagonal.to(at::kDouble).sum().item<double>() / static_cast<double>(columns - report->dead_columns);
  h = h / mean;
  diagonal = (diagonal / mean).masked_fill_(dead, 1.0);
  h.diagonal().copy_(diagonal);
  const at::Tensor objective_h = report->dead_columns == 0 ? h : h.clone();
  if (report->dead_columns > 0) objective_h.diagonal().masked_fill_(dead.to(h.device()), 0.0);

  const int64_t group_size = ResolveGroupSize(settings.group_size, columns);
  const Order order = MakeOrder(columns, group_size, settings.order_groups ? diagonal.const_data_ptr<float>() : nullptr);
  const at::Tensor index = at::tensor(order.columns, at::kLong);
  const at::Tensor device_index = index.to(h.device());
  const at::Tensor factor =
      DampedFactor(h.index_select(0, device_index).index_select(1, device_index), settings.damp_fraction, report).cpu();

  const at::Tensor device_h = objective_h.cpu();
  const auto row_errors = [&](const QuantizedLinear& q) { return RowErrors(w - q.Dequantize(), device_h); };
  const at::Tensor signal = RowErrors(w, device_h).sum();
  const at::Tensor nearest_errors = row_errors(nearest);
  const double total = signal.item<double>();
  const auto relative = [&](const at::Tensor& errors) { return total > 0 ? errors.sum().item<double>() / total : 0.0; };
  report->rtn_relative_error = relative(nearest_errors);
  report->relative_error = report->rtn_relative_error;
  if (!factor.defined()) return nearest;

  const at::Tensor cost = diagonal.index_select(0, index).add_(report->damp_fraction).contiguous();
  QuantizedLinear result =
      RunColumns(w.t().index_select(0, index).contiguous(), factor, cost, order, settings.bits, group_size);
  // The greedy loop can lose to plain rounding in a row; rows are independent, so the better of the two is kept for each.
  const at::Tensor errors = row_errors(result);
  const at::Tensor worse = errors.gt(nearest_errors);
  const int64_t kept = worse.sum().item<int64_t>();
  if (kept > 0) {
    const at::Tensor rows = worse.nonzero().squeeze(1);
    result.codes.index_copy_(0, rows, nearest.codes.index_select(0, rows));
    result.scales.index_copy_(0, rows, nearest.scales.index_select(0, rows));
    report->notes.push_back(Join("plain rounding kept for ", kept, " of ", w.size(0), " rows, where it was better"));
  }
  report->relative_error = relative(at::minimum(errors, nearest_errors));
  return result;
}

}  // namespace refinery::quantize
