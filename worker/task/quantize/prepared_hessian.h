// worker/task/quantize/prepared_hessian.h
//
// What GPTQ needs of a Hessian and does not depend on the weights: the order of the columns and the factor of the damped
// inverse. Layers that read the same input (q, k, v; gate, up) share one.
//
// Shapes: H [n, n].  Dtypes: factorised in float64 up to 4,096 columns, float32 beyond.
// Errors: runtime::NumericException naming `name` for a Hessian that is not finite.  Threads: const after construction.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "worker/task/quantize/gptq.h"

namespace refinery::quantize {

// Processing order of the columns.
struct ColumnOrder {
  std::vector<int64_t> columns;      // processing order -> place in the matrix
  std::vector<int64_t> group_of;     // processing order -> group
  std::vector<int64_t> fit_columns;  // > 0 where a group starts: its size
  std::vector<std::pair<int64_t, int64_t>> blocks;  // [begin, end) between two lazy updates
  bool natural_groups = true;        // group_of is place / group_size
};

// -1 means all columns.
int64_t ResolveGroupSize(int64_t group_size, int64_t columns);

// kGroups: groups by their largest diagonal entry, columns inside a group by their own, both descending and stable: what matters
// most is rounded first, while others can still make up for it. Codes keep their place (GPTQModel's group-aware order).
// kClassic: all columns by their diagonal entry, descending and stable; groups are runs of that order.
// `diagonal` may be nullptr for kNatural.
ColumnOrder MakeColumnOrder(int64_t columns, int64_t group_size, ColumnOrderKind kind, const float* diagonal);

// Throws runtime::NumericException naming `name`, `what` and the first bad row and column.
void CheckFinite(const std::string& name, const std::string& what, const at::Tensor& matrix);

struct PreparedHessian {
  int64_t group_size = 0;      // resolved
  ColumnOrder order;
  // All in processing order and divided by the mean of H's live diagonal.
  at::Tensor matrix;           // H [n, n] float32 without damping
  at::Tensor factor;           // U [n, n] float32, (H + damping)^-1 = U^T U; undefined: round to nearest
  at::Tensor cross;            // D [n, n] float32 (below), or undefined
  at::Tensor grid_weights;     // [n] float32: 1 / U[i][i]^2, the cost of an error once all later columns have made up for it
  double damp_fraction = 0;    // used in the end
  int64_t dead_columns = 0;    // whose input was always zero
  std::vector<std::string> notes;

  // e H e^T for each column of `difference` [n, rows] (in processing order) -> [rows] float64.
  at::Tensor RowErrors(const at::Tensor& difference) const;
};

// `cross` (undefined: none) is sum (x_native - x_quantized) x_quantized^T [n, n] float32 over the same tokens and with the same
// factor as `hessian` = sum x_quantized x_quantized^T: what GPTAQ needs (GptqSettings::alpha).
PreparedHessian PrepareHessian(const std::string& name, const at::Tensor& hessian, const GptqSettings& settings,
                               const at::Tensor& cross = {});

// Gptq (gptq.h) with a Hessian prepared under the same settings, but for bits and grid. With alpha > 0 and a cross matrix the
// codes approximate W + alpha W D (H + damping)^-1, which minimises |W x_native - Q x_quantized|^2 for alpha = 1 (Li et al.
// 2025, arXiv:2504.02692, equation 5, solved for all columns at once), and the errors in the report are to that matrix.
QuantizedLinear GptqPrepared(const std::string& name, const at::Tensor& weight, const PreparedHessian& hessian,
                             const GptqSettings& settings, GptqReport* report);

}  // namespace refinery::quantize
