// worker/task/model/pair_gram.h
//
// The Gram matrix X^T X of bfloat16 rows by the dot-product instructions of AVX512_BF16, sums in float32: what a GPTQ Hessian
// is. A chunk of tokens is packed once, two tokens of a column side by side, as rows and as panels (pair_tile.h) of the same
// product; only tiles that touch the upper triangle are computed, half of what a general product does.
//
// Each sum is made by one unit, token pairs in order, so the result does not depend on the number of threads.
// Only where HasPairs().  Threads: strips and units are independent; all strips come before the first unit.

#pragma once

#include <cstdint>

#include "worker/task/model/bf16.h"

namespace refinery::kernels {

struct PairGram {
  const simd::Bf16* x = nullptr;  // [tokens, columns], `x_stride` numbers apart; an odd last token is paired with zeros
  int64_t tokens = 0;
  int64_t columns = 0;
  int64_t x_stride = 0;
  uint32_t* panels = nullptr;     // PairGramNumbers(...), aligned to 64 bytes
  uint32_t* rows = nullptr;       // the same
  float* upper = nullptr;         // [columns, columns], added to; below the diagonal whatever falls off
};

int64_t PairGramStrips(int64_t columns);
// Of `panels`, and of `rows`.
int64_t PairGramNumbers(int64_t tokens, int64_t columns);
void PackPairGram(const PairGram& gram, int64_t strip);

int64_t PairGramUnits(int64_t columns);
void PairGramUnit(const PairGram& gram, int64_t unit);

}  // namespace refinery::kernels
