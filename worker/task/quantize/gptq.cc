#include "worker/task/runtime/torch.h"

#include "worker/task/quantize/gptq.h"

#include <algorithm>
#include <utility>

#include "common/status.h"
#include "worker/task/quantize/grid.h"
#include "worker/task/quantize/prepared_hessian.h"

namespace refinery::quantize {
namespace {

void CheckSettings(const at::Tensor& weight, const GptqSettings& settings) {
  TORCH_CHECK(weight.dim() == 2, "GPTQ needs a matrix, got ", weight.sizes());
  TORCH_CHECK(settings.bits == 2 || settings.bits == 3 || settings.bits == 4 || settings.bits == 8, "bits must be 2, 3, 4 or 8, not ",
              settings.bits);
  TORCH_CHECK(settings.group_size == -1 || settings.group_size > 0, "group_size must be -1 or positive, not ",
              settings.group_size);
}

// The column loop over all rows. `transposed` is W^T in processing order and is consumed; `factor` U (undefined: plain
// rounding) and `grid_weights` are in processing order too.
QuantizedLinear RunColumns(at::Tensor transposed, const at::Tensor& factor, const at::Tensor& grid_weights, const ColumnOrder& order,
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

}  // namespace

at::Tensor QuantizedLinear::Dequantize() const {
  const int64_t columns = codes.size(1);
  const auto widen = [&](const at::Tensor& of_groups) {
    const at::Tensor values = of_groups.to(at::kFloat);
    if (group_index.defined()) return values.index_select(1, group_index.to(values.device(), at::kLong));
    return values.repeat_interleave(group_size, 1).slice(1, 0, columns);
  };
  at::Tensor values = codes.to(at::kFloat);
  if (zeros.defined()) {
    values.sub_(widen(zeros));
  } else {
    values.sub_(static_cast<double>(int64_t{1} << (bits - 1)));
  }
  return values.mul_(widen(scales));
}

QuantizedLinear RoundToNearest(const at::Tensor& weight, const GptqSettings& settings) {
  CheckSettings(weight, settings);
  const at::NoGradGuard no_grad;
  const int64_t group_size = ResolveGroupSize(settings.group_size, weight.size(1));
  const ColumnOrder order = MakeColumnOrder(weight.size(1), group_size, nullptr);
  return RunColumns(weight.detach().cpu().to(at::kFloat).t().contiguous(), {}, {}, order, settings.bits, group_size);
}

QuantizedLinear GptqPrepared(const std::string& name, const at::Tensor& weight, const PreparedHessian& hessian,
                             const GptqSettings& settings, GptqReport* report) {
  CheckSettings(weight, settings);
  const int64_t columns = static_cast<int64_t>(hessian.order.columns.size());
  TORCH_CHECK(weight.size(1) == columns, name, ": a Hessian of ", columns, " columns does not fit weight ", weight.sizes());
  const at::NoGradGuard no_grad;
  GptqReport unused;
  if (report == nullptr) report = &unused;
  *report = {.damp_fraction = hessian.damp_fraction, .dead_columns = hessian.dead_columns, .notes = hessian.notes};
  const at::Tensor w = weight.detach().to(at::kFloat).cpu();
  CheckFinite(name, "weight", w);

  QuantizedLinear nearest = RoundToNearest(w, settings);
  const double total = hessian.RowErrors(w).sum().item<double>();
  const at::Tensor nearest_errors = hessian.RowErrors(w - nearest.Dequantize());
  const auto relative = [total](const at::Tensor& errors) { return total > 0 ? errors.sum().item<double>() / total : 0.0; };
  report->relative_error = report->rtn_relative_error = relative(nearest_errors);
  if (!hessian.factor.defined()) return nearest;

  const at::Tensor index = at::tensor(hessian.order.columns, at::kLong);
  QuantizedLinear result = RunColumns(w.t().index_select(0, index).contiguous(), hessian.factor, hessian.grid_weights,
                                      hessian.order, settings.bits, hessian.group_size);
  // The greedy loop can lose to plain rounding in a row; rows are independent, so the better of the two is kept for each.
  const at::Tensor errors = hessian.RowErrors(w - result.Dequantize());
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

QuantizedLinear Gptq(const std::string& name, const at::Tensor& weight, const at::Tensor& hessian,
                     const GptqSettings& settings, GptqReport* report) {
  CheckSettings(weight, settings);
  return GptqPrepared(name, weight, PrepareHessian(name, hessian, settings), settings, report);
}

}  // namespace refinery::quantize
