#include "worker/task/runtime/torch.h"

#include "worker/task/quantize/gptq.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "common/status.h"
#include "worker/task/quantize/grid.h"
#include "worker/task/quantize/lane_product.h"
#include "worker/task/quantize/prepared_hessian.h"
#include "worker/task/quantize/refine.h"

namespace refinery::quantize {
namespace {

void CheckSettings(const at::Tensor& weight, const GptqSettings& settings) {
  TORCH_CHECK(weight.dim() == 2, "GPTQ needs a matrix, got ", weight.sizes());
  TORCH_CHECK(settings.bits == 2 || settings.bits == 3 || settings.bits == 4 || settings.bits == 8, "bits must be 2, 3, 4 or 8, not ",
              settings.bits);
  TORCH_CHECK(settings.group_size == -1 || settings.group_size > 0, "group_size must be -1 or positive, not ",
              settings.group_size);
}

// Rows that are worked on together, by one thread: few enough that their columns stay in its cache, and few enough that the
// narrowest matrices still keep two threads busy. Fixed, so that results do not depend on the number of threads.
constexpr int64_t kChunkRows = 96;

// Some rows of a matrix while they are worked on: transposed, [columns or groups, rows], codes and groups at their original place.
struct Columns {
  at::Tensor codes;   // uint8
  at::Tensor scales;  // float32, exact in float16
  at::Tensor zeros;   // float32
};

void ForTiles(int64_t rows, const std::function<void(int64_t first_row)>& work) {
  for (int64_t row = 0; row < rows; row += kLanes) work(row);
}

// The column loop over all rows. `values` is W^T in processing order and becomes its quantized form; `factor` U (undefined:
// plain rounding) and `grid_weights` (undefined: all the same) are in processing order too.
Columns RunColumns(at::Tensor values, const at::Tensor& factor, const at::Tensor& grid_weights, const ColumnOrder& order,
                   const GptqSettings& settings, int64_t group_size) {
  const int64_t columns = values.size(0), rows = values.size(1);
  const int64_t groups = (columns + group_size - 1) / group_size;
  Columns result{.codes = at::empty({columns, rows}, at::kByte), .scales = at::empty({groups, rows}, at::kFloat),
                 .zeros = at::empty({groups, rows}, at::kFloat)};
  at::Tensor errors = factor.defined() ? at::empty({kMaxBlock, rows}, at::kFloat) : at::Tensor();
  ColumnBlock block{.rows = rows,
                    .rule = {.grid = settings.grid, .bits = settings.bits, .smallest_zero = settings.smallest_zero},
                    .original = order.columns.data(), .group_of = order.group_of.data(),
                    .fit_columns = order.fit_columns.data(),
                    .grid_weights = grid_weights.defined() ? grid_weights.const_data_ptr<float>() : nullptr,
                    .factor = factor.defined() ? factor.const_data_ptr<float>() : nullptr, .factor_stride = columns,
                    .weight = values.data_ptr<float>(), .errors = errors.defined() ? errors.data_ptr<float>() : nullptr,
                    .codes = result.codes.data_ptr<uint8_t>(), .scales = result.scales.data_ptr<float>(),
                    .zeros = result.zeros.data_ptr<float>()};
  for (const auto& [begin, end] : order.blocks) {
    block.begin = begin;
    block.end = end;
    ForTiles(rows, [&block](int64_t first_row) { QuantizeTile(block, first_row); });
    if (factor.defined() && end < columns) {  // W[:, end:] -= E U[begin:end, end:], transposed
      Multiply({.a = block.factor + begin * columns + end, .a_stride = columns, .b = block.errors, .out = block.weight + end * rows,
                .rows = rows, .depth = end - begin, .width = columns - end, .factor = -1, .add = true});
    }
  }
  return result;
}

// Coordinate descent (refine.h). `errors` is wanted - quantized, transposed and in processing order, and is updated.
void Refine(const PreparedHessian& hessian, const GptqSettings& settings, at::Tensor errors, Columns* columns) {
  const int64_t rows = errors.size(1), n = errors.size(0);
  at::Tensor gradient = at::empty({kMaxBlock, rows}, at::kFloat);
  RefineBlock block{.rows = rows, .bits = settings.bits, .original = hessian.order.columns.data(),
                    .group_of = hessian.order.group_of.data(), .fit_columns = hessian.order.fit_columns.data(),
                    .hessian = hessian.matrix.const_data_ptr<float>(), .hessian_stride = n,
                    .damp = static_cast<float>(hessian.damp_fraction), .gradient = gradient.const_data_ptr<float>(),
                    .errors = errors.data_ptr<float>(), .codes = columns->codes.data_ptr<uint8_t>(),
                    .scales = columns->scales.data_ptr<float>(), .zeros = columns->zeros.const_data_ptr<float>()};
  for (int64_t sweep = 0; sweep < settings.refine_sweeps; ++sweep) {
    for (const auto& [begin, end] : hessian.order.blocks) {
      block.begin = begin;
      block.end = end;
      Multiply({.a = block.hessian + begin, .a_stride = n, .b = block.errors, .out = gradient.data_ptr<float>(), .rows = rows,
                .depth = n, .width = end - begin});  // H is symmetric
      ForTiles(rows, [&block](int64_t first_row) { RefineTile(block, first_row); });
    }
  }
}

// Where the rows' results go, and what is known of each row.
struct Output {
  QuantizedLinear linear;
  at::Tensor signal, rounded, error;  // [out] float64: w H w^T, and e H e^T of plain rounding and of the result
  at::Tensor kept;                    // [out] bool: plain rounding was better

  Output(int64_t rows, const ColumnOrder& order, const GptqSettings& settings, int64_t group_size) {
    const int64_t columns = static_cast<int64_t>(order.columns.size()), groups = (columns + group_size - 1) / group_size;
    linear = {.codes = at::empty({rows, columns}, at::kByte), .scales = at::empty({rows, groups}, at::kHalf),
              .bits = settings.bits, .group_size = group_size};
    if (settings.grid == Grid::kAsymmetric) linear.zeros = at::empty({rows, groups}, at::kByte);
    signal = at::zeros({rows}, at::kDouble);
    rounded = at::zeros({rows}, at::kDouble);
    error = at::zeros({rows}, at::kDouble);
    kept = at::zeros({rows}, at::kBool);
    if (order.natural_groups) return;
    linear.group_index = at::empty({columns}, at::kInt);
    for (int64_t i = 0; i < columns; ++i) {
      linear.group_index.data_ptr<int32_t>()[order.columns[i]] = static_cast<int32_t>(order.group_of[i]);
    }
  }

  void Store(int64_t first, int64_t last, const Columns& columns) {
    linear.codes.slice(0, first, last).copy_(columns.codes.t());
    linear.scales.slice(0, first, last).copy_(columns.scales.t());
    if (linear.zeros.defined()) linear.zeros.slice(0, first, last).copy_(columns.zeros.t());
  }
};

// Calls work(first, last) for chunks of rows, each by one thread.
void ForChunks(int64_t rows, const std::function<void(int64_t first, int64_t last)>& work) {
  const bool inference = c10::InferenceMode::is_enabled();  // a mode is a thread's own; tensors made in one stay with it
  at::parallel_for(0, (rows + kChunkRows - 1) / kChunkRows, 1, [&](int64_t begin, int64_t end) {
    const c10::InferenceMode mode(inference);
    const at::NoGradGuard no_grad;
    for (int64_t chunk = begin; chunk < end; ++chunk) work(chunk * kChunkRows, std::min((chunk + 1) * kChunkRows, rows));
  });
}

// Rows [first, last) of GptqPrepared. `w` is float32, `index` the processing order.
void QuantizeRows(const at::Tensor& w, const at::Tensor& index, const PreparedHessian& hessian, const GptqSettings& settings,
                  int64_t first, int64_t last, Output* output) {
  const int64_t rows = last - first;
  const auto part = [first, last](const at::Tensor& of_rows) { return of_rows.slice(0, first, last); };
  // The weights, and beside them what plain rounding makes wrong: one product for both.
  at::Tensor both = at::empty({w.size(1), 2 * rows}, at::kFloat);
  at::Tensor wanted = part(w).t().contiguous().index_select(0, index), values = wanted.clone();
  const Columns nearest = RunColumns(values, {}, {}, hessian.order, settings, hessian.group_size);
  both.slice(1, 0, rows).copy_(wanted);
  if (settings.alpha != 0 && hessian.cross.defined() && hessian.factor.defined()) {  // W^T + alpha H^-1 D^T W^T
    const at::Tensor& u = hessian.factor;
    wanted.add_(at::mm(u.t(), at::mm(u, at::mm(hessian.cross.t(), wanted))), settings.alpha);
  }
  both.slice(1, rows).copy_(at::sub_out(values, wanted, values));
  const at::Tensor both_errors = hessian.RowErrors(both), nearest_errors = both_errors.slice(0, rows);
  part(output->signal).copy_(both_errors.slice(0, 0, rows));
  part(output->rounded).copy_(nearest_errors);
  part(output->error).copy_(nearest_errors);
  if (!hessian.factor.defined()) return output->Store(first, last, nearest);

  values.copy_(wanted);
  Columns result = RunColumns(values, hessian.factor, hessian.grid_weights, hessian.order, settings, hessian.group_size);
  at::sub_out(values, wanted, values);
  Refine(hessian, settings, values, &result);
  // The greedy loop can lose to plain rounding in a row; rows are independent, so the better of the two is kept for each.
  const at::Tensor errors = hessian.RowErrors(values), worse = errors.gt(nearest_errors);
  part(output->error).copy_(at::minimum(errors, nearest_errors));
  part(output->kept).copy_(worse);
  if (worse.any().item<bool>()) {
    result = {.codes = at::where(worse, nearest.codes, result.codes), .scales = at::where(worse, nearest.scales, result.scales),
              .zeros = at::where(worse, nearest.zeros, result.zeros)};
  }
  output->Store(first, last, result);
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
  const int64_t group_size = ResolveGroupSize(settings.group_size, weight.size(1));
  const ColumnOrder order = MakeColumnOrder(weight.size(1), group_size, ColumnOrderKind::kNatural, nullptr);
  const at::Tensor w = weight.detach().cpu().to(at::kFloat);
  Output output(w.size(0), order, settings, group_size);
  ForChunks(w.size(0), [&](int64_t first, int64_t last) {
    const at::Tensor values = w.slice(0, first, last).t().clone(at::MemoryFormat::Contiguous);
    output.Store(first, last, RunColumns(values, {}, {}, order, settings, group_size));
  });
  return output.linear;
}

QuantizedLinear GptqPrepared(const std::string& name, const at::Tensor& weight, const PreparedHessian& hessian,
                             const GptqSettings& settings, GptqReport* report) {
  CheckSettings(weight, settings);
  const int64_t columns = static_cast<int64_t>(hessian.order.columns.size());
  TORCH_CHECK(weight.size(1) == columns, name, ": a Hessian of ", columns, " columns does not fit weight ", weight.sizes());
  const at::NoGradGuard no_grad;
  const at::Tensor w = weight.detach().to(at::kFloat).cpu();
  CheckFinite(name, "weight", w);
  const at::Tensor index = at::tensor(hessian.order.columns, at::kLong);
  Output output(w.size(0), hessian.order, settings, hessian.group_size);
  ForChunks(w.size(0), [&](int64_t first, int64_t last) { QuantizeRows(w, index, hessian, settings, first, last, &output); });
  if (report == nullptr) return output.linear;
  const double total = output.signal.sum().item<double>();
  const auto relative = [total](const at::Tensor& errors) { return total > 0 ? errors.sum().item<double>() / total : 0.0; };
  *report = {.relative_error = relative(output.error), .rtn_relative_error = relative(output.rounded),
             .damp_fraction = hessian.damp_fraction, .dead_columns = hessian.dead_columns, .notes = hessian.notes};
  const int64_t kept = output.kept.sum().item<int64_t>();
  if (kept > 0) report->notes.push_back(Join("plain rounding kept for ", kept, " of ", w.size(0), " rows, where it was better"));
  return output.linear;
}

QuantizedLinear Gptq(const std::string& name, const at::Tensor& weight, const at::Tensor& hessian,
                     const GptqSettings& settings, GptqReport* report) {
  CheckSettings(weight, settings);
  return GptqPrepared(name, weight, PrepareHessian(name, hessian, settings), settings, report);
}

}  // namespace refinery::quantize
