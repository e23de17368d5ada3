// worker/task/quantize/gptq.h
//
// GPTQ of one weight matrix (Frantar et al. 2022, arXiv:2210.17323): given W and the Hessian X^T X of its inputs, integer codes
// and scales that minimise tr((W - Q) H (W - Q)^T) greedily, column by column.
//
// Shapes: W [out, in], H [in, in], group size g along `in` (the last group may be ragged), codes [out, in] unsigned
// 0 .. 2^bits - 1, scales [out, groups] float16, zero points [out, groups] on an asymmetric grid (else 2^(bits-1) everywhere).
// Dtypes: computed in float32.  Scales are rounded to float16 before the codes, so the codes are exact for the stored scale.

#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "worker/task/quantize/grid.h"

namespace refinery::quantize {

// The order in which columns are rounded.
enum class ColumnOrderKind {
  kGroups,   // groups by their largest diag H, columns within them by their own (codes and groups keep their place)
  kNatural,  // as they stand
  kClassic,  // act_order: all columns by descending diag H; groups are runs of that order, so group_index is permuted
};

struct GptqSettings {
  int64_t bits = 4;              // 2, 3, 4, 8
  int64_t group_size = 64;       // -1 = one group
  double damp_fraction = 0.01;   // of mean(diag H); raised by itself when the Cholesky factorisation fails
  Grid grid = Grid::kFullRange;
  ColumnOrderKind order = ColumnOrderKind::kGroups;
  double alpha = 0;              // GPTAQ's: how much of the input's own error the weights make up for; 0 = off
  int64_t smallest_zero = 1;     // asymmetric grid: GPTQ v1 cannot store a zero point of 0, v2 can
  int64_t refine_sweeps = 2;     // coordinate descent over codes and scales afterwards (refine.h); 0 = the paper's GPTQ
};

struct QuantizedLinear {
  at::Tensor codes;              // [out, in] uint8
  at::Tensor scales;             // [out, groups] float16, may be negative (full-range symmetric grid)
  int64_t bits = 0;
  int64_t group_size = 0;        // resolved: never -1
  at::Tensor zeros;              // [out, groups] uint8; undefined = 2^(bits-1) everywhere
  at::Tensor group_index;        // [in] int32, the group of each column; undefined = i / group_size

  // scale * (code - zero), [out, in] float32.
  at::Tensor Dequantize() const;
};

struct GptqReport {
  double relative_error = 0;     // tr((W-Q) H (W-Q)^T) / tr(W H W^T)
  double rtn_relative_error = 0; // the same for plain rounding on the same grid rule
  double damp_fraction = 0;      // used in the end
  int64_t dead_columns = 0;
  std::vector<std::string> notes;  // fallbacks
};

// weight [out, in] any float dtype; hessian [in, in] float32 (any positive factor). Throws runtime::NumericException naming
// `name` when weight or Hessian is not finite.
QuantizedLinear Gptq(const std::string& name, const at::Tensor& weight, const at::Tensor& hessian,
                     const GptqSettings& settings, GptqReport* report);

// Round to nearest on the same grid rule (no Hessian); groups are runs of columns, whatever the order.
QuantizedLinear RoundToNearest(const at::Tensor& weight, const GptqSettings& settings);

// Codes packed as GPTQ v1 stores them: qweight [in*bits/32, out] int32 along `in`, qzeros [groups, out*bits/32] int32 holding
// zero-1, scales [groups, out] float16, g_idx [in] int32. in and out must be multiples of 32.
struct PackedGptq {
  at::Tensor qweight, qzeros, scales, g_idx;
};
PackedGptq PackGptqV1(const QuantizedLinear& linear);
// The same as GPTQ v2 stores it: qzeros hold the zero points themselves.
PackedGptq PackGptqV2(const QuantizedLinear& linear);

struct PackedLayout {
  int64_t bits = 4;
  int64_t group_size = 64;     // -1 = one group
  int64_t version = 1;         // 1: qzeros hold zero-1; 2: the zero points themselves
  bool symmetric = true;       // zero points other than 2^(bits-1) are damage
  bool natural_groups = true;  // a g_idx other than i / group_size is damage
};
// What is wrong with packed tensors that claim this layout (types, shapes, zero points, g_idx); empty if nothing is.
std::string PackedProblem(const PackedGptq& packed, const PackedLayout& layout);
// The inverse of PackGptqV1 and PackGptqV2. zeros is defined only where the layout is not symmetric, group_index only where its
// groups are not natural. c10::Error if PackedProblem is not empty.
QuantizedLinear UnpackGptq(const PackedGptq& packed, const PackedLayout& layout);

// The same for a symmetric v1 layout with groups in order.
std::string PackedProblem(const PackedGptq& packed, int64_t bits, int64_t group_size);
QuantizedLinear UnpackGptqV1(const PackedGptq& packed, int64_t bits, int64_t group_size);

}  // namespace refinery::quantize
