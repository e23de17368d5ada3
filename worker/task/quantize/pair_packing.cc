#include "worker/task/quantize/pair_packing.h"

#include <algorithm>

namespace refinery::quantize {
namespace {
constexpr int64_t kStrip = 64;  // columns
constexpr int64_t kTile = 16;   // words of one cache line
}  // namespace

int64_t PairStrips(int64_t columns) { return (columns + kStrip - 1) / kStrip; }

void PackPairStrip(const PairPacking& packing, int64_t strip) {
  const int64_t begin = strip * kStrip, end = std::min(begin + kStrip, packing.columns);
  const int64_t words = (packing.tokens + 1) / 2;
  for (int64_t w = 0; w < words; ++w) {
    const uint16_t* first = packing.rows + 2 * w * packing.columns;
    uint32_t* out = packing.pairs + w * packing.columns;
    if (2 * w + 1 < packing.tokens) {
      const uint16_t* second = first + packing.columns;
      for (int64_t c = begin; c < end; ++c) out[c] = first[c] | static_cast<uint32_t>(second[c]) << 16;
    } else {
      for (int64_t c = begin; c < end; ++c) out[c] = first[c];
    }
  }
  for (int64_t w = 0; w < words; w += kTile) {
    const int64_t last = std::min(w + kTile, words);
    for (int64_t c = begin; c < end; ++c) {
      uint32_t* out = packing.transposed + c * words;
      for (int64_t i = w; i < last; ++i) out[i] = packing.pairs[i * packing.columns + c];
    }
  }
}

}  // namespace refinery::quantize
