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
};

// -1 means all columns.
int64_t ResolveGroupSize(int64_t group_size, int64_t columns);

// Groups by their largest diagonal entry, columns inside a group by their own, both descending and stable: what matters most
// is rounded first, while others can still make up for it. Codes keep their place (GPTQModel's group-aware order). Natural
// order where `diagonal` is nullptr.
ColumnOrder MakeColumnOrder(int64_t columns, int64_t group_size, const float* diagonal);

// Throws runtime::NumericException naming `name`, `what` and the first bad row and column.
void CheckFinite(const std::string& name, const std::string& what, const at::Tensor& matrix);

struct PreparedHessian {
  int64_t group_size = 0;      // resolved
  ColumnOrder order;
  at::Tensor factor;           // U [n, n] float32 in processing order, H^-1 = U^T U; undefined: round to nearest
  at::Tensor grid_weights;     // [n] float32 in processing order: cost of an error in the grid search
  at::Tensor half;             // [n, n] float32: diagonal + 2 * strict upper triangle, so that e H e^T = e half e^T
  double damp_fraction = 0;    // used in the end
  int64_t dead_columns = 0;    // whose input was always zero
  std::vector<std::string> notes;

  // e H e^T for each row of `difference` [rows, n] -> [rows] float64.
  at::Tensor RowErrors(const at::Tensor& difference) const;
};

PreparedHessian PrepareHessian(const std::string& name, const at::Tensor& hessian, const GptqSettings& settings);

// Gptq (gptq.h) with a Hessian prepared under the same settings.
QuantizedLinear GptqPrepared(const std::string& name, const at::Tensor& weight, const PreparedHessian& hessian,
                             const GptqSettings& settings, GptqReport* report);

}  // namespace refinery::quantize
