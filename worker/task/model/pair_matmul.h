// worker/task/model/pair_matmul.h
//
// y = x W^T for many rows of x, by the dot-product instructions of AVX512_BF16, with what usually follows it done while the sums
// are still in registers: the residual added, SiLU and product of an MLP's gate, the log-sum-exp of a head.
//
// W lies as in the model ([outputs, inputs], no second copy): a panel of 64 outputs is laid out for the instruction in cache and
// serves all rows, which costs less than a hundredth of the product from 250 rows on.
// Sums are float32 along the inputs in one order, so a row's result is the same to the last bit whatever other rows there are.
//
// The work is cut into units that threads may take in any order.
// Only where HasPairs() (pair_simd.h) and inputs is even.  Threads: pure functions on what they are given.

#pragma once

#include <cstdint>

#include "worker/task/model/bf16.h"

namespace refinery::kernels {

constexpr int64_t kPanelOutputs = 64;

struct PairMatmul {
  const simd::Bf16* x = nullptr;       // [rows, inputs], row stride x_stride
  int64_t rows = 0, inputs = 0, x_stride = 0;
  const simd::Bf16* weight = nullptr;  // [outputs, inputs]
  int64_t outputs = 0;
  bool by_inputs = false;              // weight is [inputs, outputs] instead: y = x W; without `up`
  const simd::Bf16* bias = nullptr;    // [outputs] or null
  const simd::Bf16* up = nullptr;      // [outputs, inputs]: y = silu(x W^T) * (x up^T), without bias and residual
  const simd::Bf16* residual = nullptr;  // [rows, outputs], row stride y_stride, added before rounding; may be y itself
  float* partial = nullptr;            // [rows, outputs], row stride y_stride: added; without `up`
  simd::Bf16* y = nullptr;             // [rows, outputs], row stride y_stride; null: the sum goes to `partial`, not rounded
  int64_t y_stride = 0;
};

// A thread's scratch: the panel that it laid out last, so that neighbouring units share it. Forget it (weight = nullptr) when the
// weights may have changed.
struct PairPanel {
  uint32_t* numbers = nullptr;         // PairPanelNumbers() of them, aligned to 64 bytes
  const simd::Bf16* weight = nullptr;
  int64_t index = 0;
};
int64_t PairPanelNumbers(int64_t inputs);

// Units of work of a product: panels, each cut into pieces of rows; neighbours share a panel.
int64_t PairMatmulUnits(const PairMatmul& matmul);
void PairMatmulUnit(const PairMatmul& matmul, int64_t unit, PairPanel& panel);

// What a head's scores need of the logits x W^T, which are never written out. Panel p covers outputs [64 p, 64 p + 64).
struct PanelTop {
  float highest = 0;        // logit
  float sum = 0;            // of exp(logit - highest)
  int32_t first = 0;        // output with the highest logit, the lowest of equal ones
};
struct PairHead {
  const simd::Bf16* x = nullptr;       // [rows, inputs]
  int64_t rows = 0, inputs = 0;
  const simd::Bf16* weight = nullptr;  // [outputs, inputs]
  int64_t outputs = 0;
  PanelTop* tops = nullptr;            // [rows, panels] out
  // Logits wanted: those of outputs of panel p are wanted[starts[p] .. starts[p + 1]), sorted by row.
  struct Wanted {
    int32_t row = 0, output = 0;
    float logit = 0;                   // out
  };
  Wanted* wanted = nullptr;
  const int64_t* starts = nullptr;     // [panels + 1]
};
// One unit is one panel.
void PairHeadPanel(const PairHead& head, int64_t panel, PairPanel& scratch);

}  // namespace refinery::kernels
