// worker/task/quantize/pair_packing.h
//
// The layouts that bfloat16 dot products want (AVX512-BF16, AMX): two consecutive tokens of one column side by side in one
// 32-bit word. Both operands of X^T X are made from the same words. No LibTorch here.
//
// Threads: strips are independent.

#pragma once

#include <cstdint>

namespace refinery::quantize {

struct PairPacking {
  const uint16_t* rows = nullptr;  // [tokens, columns] bfloat16
  int64_t tokens = 0;              // an odd last token is paired with zeros
  int64_t columns = 0;
  uint32_t* pairs = nullptr;       // out [ceil(tokens / 2), columns]
  uint32_t* transposed = nullptr;  // out [columns, ceil(tokens / 2)]
};

// Columns are worked on in this many strips.
int64_t PairStrips(int64_t columns);
void PackPairStrip(const PairPacking& packing, int64_t strip);

}  // namespace refinery::quantize
